"""What the tests of `DistillTrainer` in combination with other features share."""

from typing import Any

import pytest
from peft import LoraConfig
from torch import Tensor

from tests.training import assert_same_gradient

TERMS = ("loss", "kd", "ce", "hidden", "teacher_ce")
Run = tuple[dict[str, float], dict[str, Tensor]]


def assert_same_run(ours: Run, theirs: Run, rtol: float = 1e-5) -> None:
    """Compare what `one_step` returned: the terms, the tokens and the gradients."""
    assert_same_gradient(ours[1], theirs[1], rtol)
    for name in TERMS:
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=rtol), name
    assert ours[0]["num_tokens"] == theirs[0]["num_tokens"]


def lora(**how: Any) -> LoraConfig:
    """An adapter of rank 4, whose B starts at 0.

    Args:
        how: fields of `LoraConfig`.
    """
    defaults = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**defaults, "init_lora_weights": "gaussian", **how})
