"""Two models trained from different seeds: what lies between them is better once they are aligned."""

import functools

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy

from cbd_trl import chain_from_anchors, from_chain
from cbd_trl.architectures import describe
from cbd_trl.losses.held_out import held_out_loss
from cbd_trl.targets.operators import NESTED_ALPHA_POWER
from tests.markov import VOCABULARY, markov_text
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

STEPS = 120
SHARES = (0.3, 0.5, 0.7)
_LARGE = {
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_inner": 128},
    "llama": {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
}
_SMALL = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 80},
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
}


def trained(family, shape, seed):
    depth = {} if family == "gpt2" else {"num_hidden_layers": 2}
    config = tiny_model(family, tie_word_embeddings=True, vocab_size=VOCABULARY, **depth, **shape).config
    torch.manual_seed(seed)
    model = type(tiny_model(family))(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(STEPS):
        batch = markov_text(16, 24, seed=10_000 * seed + step)
        logits = model(batch).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@functools.cache
def anchors(family):
    return trained(family, _LARGE[family], seed=1), trained(family, _SMALL[family], seed=2)


def losses_between(chain, operator, text):
    """Held-out loss of three sizes, above the straight line between the anchors."""
    large, small = (anchor.num_parameters for anchor in chain.anchors)
    ends = [held_out_loss(anchor.load_model(), text) for anchor in chain.anchors]
    excess = []
    for share in SHARES:
        model = from_chain(chain, small + share * (large - small), operator=operator, tolerance=0.2)
        along = (model.num_parameters() - small) / (large - small)
        excess.append(held_out_loss(model, text) - ends[1] - along * (ends[0] - ends[1]))
    return excess


# What is matched is proved family by family in tests/surgery/test_align.py; here it is worth it.
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_aligned_is_clearly_better(family, tmp_path):
    rows = Dataset.from_dict({"input_ids": markov_text(64, 24, seed=1).tolist()})
    options = {"dataset": rows, "processing_class": tiny_tokenizer()}
    aligned, apart = (
        chain_from_anchors(anchors(family), output_dir=tmp_path / str(align), align=align, **options)
        for align in (True, False)
    )
    held_out = markov_text(64, 24, seed=2)
    for operator in ("nested", "linear"):
        better, worse = (losses_between(chain, operator, held_out) for chain in (aligned, apart))
        assert all(one < other for one, other in zip(better, worse, strict=True))
        assert sum(better) < 0.7 * sum(worse)
    for kind, quality in aligned.anchors[1].training["match"].items():
        assert quality["matched"] > 1.3 * quality["random"], kind

    # One that has little in common with the upper anchor counts in full; of the upper anchor's own cut half is
    # worth more than the whole. Nothing is measured of anchors that share their coordinates.
    large, small = anchors(family)
    own_cut = from_chain(aligned, config=describe(small.config).shape, operator="slice")
    related = chain_from_anchors((large, own_cut), output_dir=tmp_path / "related", **options)
    powers = [chain.anchors[1].alpha_power for chain in (aligned, related, apart)]
    assert powers == [0, NESTED_ALPHA_POWER, None]
