"""One step and one evaluation, run by `test_launch.py` in one process and in two."""

from typing import Any

import torch
from peft import LoraConfig

from tests.build.width_pairs import width_trainer
from tests.trainers.bridge_runs import make_bridge
from tests.training import make_trainer, one_step, text_rows

_ADAPTER = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "hybrid": {"swap_probability": 1.0},
    "hybrid in width": {"make": width_trainer},
    "packed": {"packing": True, "max_length": 20},
    "projectors": {"hidden_projector": True},
    "lora": {"peft_config": _ADAPTER},
    "bridge": {"make": make_bridge, "hidden_projector": True},
    "bridge by attention": {"make": make_bridge, "hidden_projector": True, "objective": "dskd-cma"},
    "own base": {"peft_config": _ADAPTER, "self_distillation": True},
}


def measure(processes: int) -> dict[str, tuple]:
    """For each case the training log, the gradients and the evaluation.

    Args:
        processes: how many share the four training rows of a step.
    """
    results = {}
    for name, case in _CASES.items():
        torch.manual_seed(0)  # adapters start at random
        how = {"make": make_trainer, **case}
        trainer = how.pop("make")(
            # Four rows, or the two that they are packed into.
            per_device_train_batch_size=(2 if "packing" in how else 4) // processes,
            per_device_eval_batch_size=2,
            eval_dataset=text_rows((1, 12, 2, 9, 4), seed=3),
            hidden_weight=1.0,
            **how,
        )
        metrics = trainer.evaluate()
        _, grads = one_step(trainer)
        logs = next(entry for entry in trainer.state.log_history if "loss" in entry)
        results[name] = logs, grads, metrics
    return results
