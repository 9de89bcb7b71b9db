"""Folding norms into their readers."""

import torch

from cbd_trl.surgery.norms import fold_norms, folds
from tests.surgery.helpers import TOLERANCE, build, changed, described, difference, every_case, full_model
from tests.tiny import WIDTH_OF_HEADS


@every_case
def test_folding_leaves_the_logits_equal(family, tied):
    model = full_model(family, tied)
    weights, architecture = described(model)
    assert difference(build(fold_norms(weights, architecture), architecture), model) <= TOLERANCE


@every_case
def test_folded_norms_have_gain_one_and_bias_zero(family, tied):
    weights, architecture = described(full_model(family, tied))
    folded = fold_norms(weights, architecture)
    norms = [site for site in architecture.sites if site.norm]
    assert [folds(site, architecture) for site in norms] == [True] * (len(norms) - 1) + [
        not tied and family not in WIDTH_OF_HEADS
    ]
    for site in norms:
        gain, bias = f"{site.name}.weight", f"{site.name}.bias"
        if folds(site, architecture):
            assert (folded[gain] == 1).all()
            assert bias not in folded or (folded[bias] == 0).all()
        else:
            assert torch.equal(folded[gain], weights[gain])
            assert bias not in folded or torch.equal(folded[bias], weights[bias])
    assert not any(folds(site, architecture) for site in architecture.sites if not site.norm)


@every_case
def test_folding_twice_is_folding_once(family, tied):
    weights, architecture = described(full_model(family, tied))
    folded = fold_norms(weights, architecture)
    assert not changed(fold_norms(folded, architecture), folded)
