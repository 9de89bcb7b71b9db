"""nanochat: Llama's attention, a plain FFN, norms without gains, and one more of them on the input embeddings.

The surgery works with gains of 1, which the readers take when the weights are stored. The norm on the embeddings makes
the size of the stream fixed, so growth in width multiplies what writes the stream, as in OPT, and not the epsilon. The
norms of each head's queries and keys have nothing to describe.
"""

from dataclasses import replace
from typing import Any

from cbd_trl.architectures.base import Site
from cbd_trl.architectures.llama import ATTENTION_BIASES, LLAMA


def _layer_tensors(config: Any) -> dict[str, str]:
    tensors = {
        "self_attn.q_proj.weight": "group.query.dim width",
        "self_attn.k_proj.weight": "group.dim width",
        "self_attn.v_proj.weight": "group.dim width",
        "self_attn.o_proj.weight": "width group.query.dim",
        "mlp.fc1.weight": "ffn width",
        "mlp.fc2.weight": "width ffn",
    }
    return tensors | ATTENTION_BIASES if config.attention_bias else tensors


def _check(config: Any) -> None:
    if config.tie_word_embeddings:
        raise ValueError(
            "tie_word_embeddings=True is not supported for nanochat: its norms have no gain that could take up a "
            "change of the table's scale, which growth and cuts need between reading tokens and predicting them. "
            "Supported: tie_word_embeddings=False, with a copy of the table as lm_head."
        )


NANOCHAT = replace(
    LLAMA,
    model_types=("nanochat",),
    tensors=lambda config: {"model.embed_tokens.weight": "vocab width", "lm_head.weight": "vocab width"},
    layer_tensors=_layer_tensors,
    sites=(
        *LLAMA.sites[:2],
        Site("post_attention_layernorm", ("width",), ("mlp.fc1",), norm=True),
        Site("mlp.fc2", ("ffn",), ("mlp.fc2",), norm=False),
    ),
    check=_check,
    bare_norms=True,
)
