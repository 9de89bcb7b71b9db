"""A chain and two teacher caches as this version writes them, kept so that every later version has to read them.

They were made by `python -m tests.stored`. Made anew only when a format changes, which is to be never; a format that
comes after them gets a folder of its own, beside them.
"""

import shutil
from pathlib import Path
from typing import Any

from cbd_trl import build_chain
from cbd_trl.cache import write_cache
from tests.cache.helpers import make_args, token_dataset
from tests.chain.helpers import chain_config, chain_rows
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

CHAIN = Path(__file__).parent / "chain" / "stored" / "schema-5"
CACHES = Path(__file__).parent / "cache" / "stored" / "format-2"
KINDS: dict[str, dict[str, Any]] = {"top_k": {"k": 4}, "hidden": {"hidden_dtype": "float16"}}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}


def stored_teacher() -> Any:
    """The model that the chain was cut from and the caches were made with: 3 layers of width 16."""
    return tiny_model("llama", num_hidden_layers=3, tie_word_embeddings=True, **SIZES)


def write_stored() -> None:
    """Write all of them anew."""
    shutil.rmtree(CHAIN, ignore_errors=True)
    build_chain(
        stored_teacher().bfloat16(),
        [{"num_hidden_layers": 2}],
        dataset=chain_rows(),
        output_dir=CHAIN,
        args=chain_config(max_steps=1),
        processing_class=tiny_tokenizer(),
        calibration_tokens=256,
    )
    # Cards are for people, and no part of the format.
    for card in CHAIN.rglob("README.md"):
        card.unlink()
    for kind, options in KINDS.items():
        shutil.rmtree(CACHES / kind, ignore_errors=True)
        write_cache(
            stored_teacher(),
            token_dataset(),
            CACHES / kind,
            args=make_args(CACHES / kind),
            processing_class=tiny_tokenizer(),
            kind=kind,
            **options,
        )


if __name__ == "__main__":
    write_stored()
