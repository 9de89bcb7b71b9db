"""On held-out tokens of a trained model the least-squares cut is closer to the full model than the plain cut, and
closer still on its principal axes."""

import functools

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from cbd_trl.surgery.least_squares import least_squares_cut, plain_cut
from cbd_trl.surgery.reorder import importance, sort_weights, to_principal_axes
from cbd_trl.surgery.statistics import Statistics, collect_statistics
from tests.markov import VOCABULARY, markov_text
from tests.surgery.helpers import build, described, stream_second
from tests.surgery.test_rotate import ROTATED
from tests.tiny import HEADS, LAYER_NORM, MIXTURES, WIDTH_OF_HEADS, own_names, tiny_model

STEPS = 250


@functools.cache
def trained(family: str, tied: bool):
    """A model trained on the source, sorted: (model, weights, architecture, statistics)."""
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6 if family in WIDTH_OF_HEADS else 3}
    shape = own_names(family, hidden_size=48, intermediate_size=96, num_hidden_layers=2, **heads)
    shape |= {} if family in WIDTH_OF_HEADS else {"head_dim": 8}
    model = tiny_model(family, tie_word_embeddings=tied, vocab_size=VOCABULARY, **shape)
    # Trained from the family's own initialization: the point here is a real model, not one where nothing can hide.
    torch.manual_seed(1)
    model = type(model)(model.config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(STEPS):
        batch = markov_text(16, 24, seed=step)
        logits = model(batch).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Uniform guessing costs 4.09.
    assert loss < 2.9
    model.eval()
    weights, architecture = described(model)
    statistics = _statistics(model, architecture)
    weights, _ = sort_weights(weights, architecture, importance(weights, architecture, statistics))
    model = build(weights, architecture)
    return model, dict(weights), architecture, _statistics(model, architecture)


def _statistics(model, architecture, change=None) -> Statistics:
    return collect_statistics(model, architecture, [{"input_ids": markov_text(100, 24, seed=1000)}], change=change)


@torch.no_grad()
def _divergence(model, reference) -> float:
    """KL(reference || model) in nats per token, on text that neither training nor the statistics saw."""
    text = markov_text(64, 24, seed=2000)
    log_model, log_reference = (m(text).logits.log_softmax(-1).flatten(0, 1) for m in (model, reference))
    return float(kl_div(log_model, log_reference, log_target=True, reduction="batchmean"))


# Two stand for all, with RMSNorms and with LayerNorms: every training takes seconds, and what a cut computes is proved
# family by family in test_least_squares.py.
_STAND_FOR_ALL = ("llama", "gpt2")
CUTS = [{"ffn": 64}, {"group": 2}, {"width": 40}, {"width": 36, "ffn": 80, "group": 2}]
CUTS_WITH_HEADS = [{"ffn": 64}, {"width": 40, "group": 5, "ffn": 80}]
CASES = [
    pytest.param(
        family,
        tied,
        sizes,
        id=f"{family}-{'tied' if tied else 'untied'}-{'-'.join(sizes)}",
        marks=() if family in _STAND_FOR_ALL else pytest.mark.slow,
    )
    for family, tied in HEADS
    for sizes in (CUTS_WITH_HEADS if family in WIDTH_OF_HEADS else CUTS)
    # What is left of an expert stays as it is.
    if family not in MIXTURES or sizes.keys() != {"ffn"}
]


# How far a tied table moves, where it is not the default: at that, one of three trainings of this one is no closer
# than the plain cut (0.120 against 0.119 nats; 0.048 at a quarter).
_SHARES = {"qwen3_5_text": 0.25}


@pytest.mark.parametrize(("family", "tied", "sizes"), CASES)
def test_least_squares_cut_is_closer_than_the_plain_cut(family, tied, sizes):
    model, weights, architecture, statistics = trained(family, tied)
    target = architecture.resized(**sizes)
    plain = _divergence(build(plain_cut(weights, architecture, target), target), model)
    refitted = least_squares_cut(weights, architecture, statistics, target, tied_head_share=_SHARES.get(family))
    assert _divergence(build(refitted, target), model) < plain


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family in _STAND_FOR_ALL else pytest.mark.slow) for family in ROTATED]
)
def test_on_principal_axes_the_cut_is_closer_still(family):
    model, weights, architecture, statistics = trained(family, False)
    target = architecture.resized(**({"width": 32, "group": 4} if family in WIDTH_OF_HEADS else {"width": 36}))
    in_order = _divergence(build(least_squares_cut(weights, architecture, statistics, target), target), model)
    weights, change = to_principal_axes(weights, architecture, stream_second(architecture, statistics))
    statistics = _statistics(model, architecture, change)
    # As a chain stores it.
    stored = {key: tensor.float() for key, tensor in weights.items()}
    on_axes = _divergence(build(least_squares_cut(stored, architecture, statistics, target), target), model)
    # Measured: a 14th to a 26th; a half to a fifth where the mean over the channels is kept or heads, which no axes
    # help, are cut too.
    assert on_axes < in_order / (1.5 if family in (*LAYER_NORM, *WIDTH_OF_HEADS) else 5)
