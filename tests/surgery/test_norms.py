"""Folding norms into their readers, and sharing gains with them."""

import torch

from cbd_trl.surgery.norms import balance_norms, fold_norms, folds
from cbd_trl.surgery.weights import input_matrix
from tests.surgery.helpers import (
    TOLERANCE,
    build,
    changed,
    described,
    difference,
    every_case,
    full_model,
    keeps_bias,
)


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
    tied_final = [False] * (len(norms) - 1) + [tied]
    assert [folds(site, architecture) for site in norms] == [
        not (tied or keeps_bias(site, architecture)) for site, tied in zip(norms, tied_final, strict=True)
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


def _columns(weights, architecture, site):
    """The size of each column over all readers of a site."""
    keys = [f"{reader}.weight" for reader in site.readers]
    parts = [input_matrix(weights[key], architecture.tensors[key], site.axis) for key in keys]
    return torch.cat(parts).square().mean(0).sqrt()


def _uneven(weights, architecture):
    """The same function (but for the single precision that Gemma norms in) with gains up to thirty times smaller."""
    uneven = dict(weights)
    for site in _balanced_sites(architecture):
        factor = torch.logspace(-1.5, 0, len(weights[f"{site.name}.weight"]), dtype=torch.float64)
        for name in (f"{site.name}.weight", f"{site.name}.bias"):
            if name in uneven:
                uneven[name] = uneven[name] * factor
        for key in (f"{reader}.weight" for reader in site.readers):
            axes = architecture.tensors[key]
            shape = [-1 if axis == site.axis else 1 for axis in axes]
            uneven[key] = uneven[key] / factor.view(shape)
    return uneven


def _balanced_sites(architecture):
    return [site for site in architecture.sites if site.norm][:-1]


@every_case
def test_balancing_leaves_the_logits_equal_and_makes_columns_alike(family, tied):
    model = full_model(family, tied)
    weights, architecture = described(model)
    uneven = _uneven(weights, architecture)
    balanced = balance_norms(uneven, architecture)
    assert difference(build(balanced, architecture), model) <= TOLERANCE
    for site in _balanced_sites(architecture):
        before, after = (_columns(these, architecture, site) for these in (uneven, balanced))
        assert before.max() / before.min() > 10
        torch.testing.assert_close(after, after[:1].expand_as(after), rtol=1e-6, atol=0)
        gains = [of[f"{site.name}.weight"].abs().median() for of in (uneven, balanced)]
        torch.testing.assert_close(gains[1].to(gains[0]), gains[0])
    assert set(changed(balanced, uneven)) == {
        key
        for site in _balanced_sites(architecture)
        for key in (f"{site.name}.weight", f"{site.name}.bias", *(f"{reader}.weight" for reader in site.readers))
        if key in weights
    }


@every_case
def test_balancing_twice_is_balancing_once(family, tied):
    weights, architecture = described(full_model(family, tied))
    once = dict(balance_norms(weights, architecture))
    for key, tensor in balance_norms(once, architecture).items():
        torch.testing.assert_close(tensor, once[key])


@every_case
def test_gains_are_of_the_size_that_is_asked_for(family, tied):
    model = full_model(family, tied)
    weights, architecture = described(model)
    like = {key: tensor * 3 for key, tensor in weights.items()}
    balanced = balance_norms(fold_norms(weights, architecture), architecture, like)
    assert difference(build(balanced, architecture), model) <= TOLERANCE
    for site in _balanced_sites(architecture):
        gains = [of[f"{site.name}.weight"].abs().median() for of in (like, balanced)]
        torch.testing.assert_close(gains[1].to(gains[0]), gains[0])


def test_what_no_reader_reads_keeps_its_gain():
    weights, architecture = described(full_model("llama", True))
    site = architecture.sites[0]
    for reader in site.readers:
        weights[f"{reader}.weight"][:, 3] = 0.0
    balanced = balance_norms(weights, architecture)
    assert balanced[f"{site.name}.weight"][3] == weights[f"{site.name}.weight"][3]
    assert all(balanced[key].isfinite().all() for key in weights)
