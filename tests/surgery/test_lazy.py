"""Weights made when asked for."""

import pytest
import torch

from cbd_trl.surgery.weights import LazyWeights


def test_only_what_is_asked_for_is_made():
    made = []

    def tensor(key):
        made.append(key)
        return torch.full((2,), float(len(key)))

    weights = LazyWeights(["bb", "a", "bb"], tensor)
    assert list(weights) == ["bb", "a"] and len(weights) == 2 and "a" in weights and "c" not in weights
    assert weights.get("c") is None and not made
    assert weights["bb"].tolist() == [2, 2] and made == ["bb"]
    assert {key: value.tolist() for key, value in weights.items()} == {"bb": [2, 2], "a": [1, 1]}
    assert made == ["bb", "bb", "a"]


def test_a_key_it_was_not_given_is_refused():
    with pytest.raises(KeyError, match="'c'"):
        LazyWeights(["a"], lambda key: torch.zeros(1))["c"]
