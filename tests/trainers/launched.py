"""Steps and evaluations, run by `test_launch.py` in one process and in two: DDP, FSDP 2 or DeepSpeed ZeRO-3."""

import os
import sys
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from cbd_trl import DistillTrainer
from tests.build.width_pairs import width_trainer
from tests.processes import settle
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.trainers.bridge_runs import make_bridge, student, teacher, texts
from tests.trainers.runs import lora
from tests.training import make_config, make_trainer, one_step, text_rows

_LORA = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
_NARROW = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
_CASES: dict[str, dict[str, Any]] = {
    "plain": {"gradient_checkpointing": False},
    "packed": {"packing": True, "max_length": 20, "hidden_weight": 1.0},
    "tied": {"student": {"tie_word_embeddings": True}, "hidden_weight": 1.0},
    "lora": {"peft": _LORA, "hidden_weight": 1.0},
    "head": {"peft": {**_LORA, "modules_to_save": ["lm_head"]}, "hidden_weight": 1.0},
    "self": {"peft": {**_LORA, "modules_to_save": ["lm_head"]}, "self_distillation": True},
    "projector": {"student": _NARROW, "hidden_weight": 1.0, "hidden_projector": True},
    "ensemble": {"teachers": 2},
    # Across vocabularies and architectures.
    "bridge": {"bridge": True, "objective": "prefix", "hidden_weight": 4.0, "hidden_projector": True},
    "bridge packed": {"bridge": True, "objective": "alm=1,uld=1", "packing": True},
    "streamed": {"stream": True, "hidden_weight": 1.0},
    "streamed packs": {"stream": True, "packing": True, "max_length": 20},
}
CASES = {
    "ddp": ["bridge", "lora", "self", "streamed", "streamed packs"],
    "fsdp": ["packed", "head"],
    "fsdp of the rest": ["plain", "tied", "lora", "self", "projector", "ensemble", "bridge", "bridge packed"],
    "zero": ["plain", "packed", "tied", "lora", "head", "self", "projector", "ensemble", "bridge", "bridge packed"],
}
SHARDING = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "cpu_ram_efficient_loading": False}

# One step each.
_STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hybrid": {"swap_probability": 1.0},
    "hybrid in width": {"make": width_trainer},
    "packed": {"packing": True, "max_length": 20},
    "projectors": {"hidden_projector": True},
    "lora": {"peft_config": lora(init_lora_weights=True)},
    "bridge": {"make": make_bridge, "hidden_projector": True},
    "bridge by attention": {"make": make_bridge, "hidden_projector": True, "objective": "dskd-cma"},
    "own base": {"peft_config": lora(init_lora_weights=True), "self_distillation": True},
}

# SGD, because two ways of adding up a gradient of almost 0 are two steps of Adam.
_ZERO = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e6, "model_init_kwargs": {"dtype": "float32"}}


class _Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
        self.grads = {name: _full(gradient).clone() for name, gradient in found.items()}


def _saved(model: Any, folder: str, name: str) -> str:
    path = os.path.join(folder, name)
    if not os.path.exists(path):  # by the one process that goes first
        model.save_pretrained(path)
    return path


def make_case(name: str, processes: int, models: str | None = None, **how: Any) -> DistillTrainer:
    """A trainer of three steps, on the rows that all processes share.

    Args:
        name: of the case.
        processes: how many share the four training rows of a step.
        models: folder to load student and teachers from; None to use them from memory.
        how: further fields of `DistillConfig`.
    """
    case = {**_CASES[name], **how}
    if case.pop("bridge", False):
        return _make_bridge_case(name, processes, models, case)
    peft, shape, teachers = case.pop("peft", None), case.pop("student", {}), case.pop("teachers", 1)
    rows = text_rows((3, 9, 5, 12) * 3)
    data = rows.to_iterable_dataset() if case.pop("stream", False) else rows
    torch.manual_seed(0)  # draws the adapter
    learner: Any = tiny_model("llama", seed=1, num_hidden_layers=2, **shape)
    every: list[Any] = [tiny_model("llama", seed=2 + i) for i in range(teachers)]
    if models is not None:
        learner, *every = (_saved(model, models, f"{name} {i}") for i, model in enumerate([learner, *every]))
    # Four rows a step, or the two that they are packed into.
    batch = (2 if "packing" in case else 4) // processes
    args = make_config(
        **{"per_device_train_batch_size": batch, "per_device_eval_batch_size": 2, "max_steps": 3, **case}
    )
    return DistillTrainer(
        learner,
        None if args.self_distillation else every,
        args,
        data,
        text_rows((1, 12, 2, 9, 4), seed=3),
        tiny_tokenizer(),
        peft_config=None if peft is None else LoraConfig(**peft),
    )


def _make_bridge_case(name: str, processes: int, models: str | None, case: dict[str, Any]) -> DistillTrainer:
    torch.manual_seed(0)  # draws the projectors
    pair: list[Any] = [student(), teacher()]
    if models is not None:
        pair = [_saved(model, models, f"{name} {i}") for i, model in enumerate(pair)]
    # Rows of 96 tokens: of the texts, 4 are packed into one or two.
    batch = (2 if "packing" in case else 4) // processes
    return make_bridge(
        model=pair[0],
        teacher_model=pair[1],
        train_dataset=Dataset.from_dict({"text": texts(12)}),
        eval_dataset=Dataset.from_dict({"text": texts(5, seed=3)}),
        **{"per_device_train_batch_size": batch, "per_device_eval_batch_size": 2, "max_steps": 3, **case},
    )


def measure_steps(processes: int) -> dict[str, tuple]:
    """For each case of one step the training log, the gradients, and the evaluation before it.

    Args:
        processes: how many share the four training rows of a step.
    """
    results = {}
    for name, case in _STEPS.items():
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


def measure(mode: str, processes: int, folder: str, models: str) -> dict[str, tuple]:
    """For each case the training logs, the gradients of the last step and the evaluation.

    Args:
        mode: one of `CASES`.
        processes: how many share a step.
        folder: for what is saved.
        models: folder for those that ZeRO-3 loads.
    """
    sharded = mode.startswith("fsdp") and processes > 1
    results = {}
    for name in CASES[mode]:
        where = os.path.join(folder, name)
        how: dict[str, Any] = _sharded(where) if sharded else {"output_dir": where}
        if mode == "zero":
            how |= {**_ZERO, "models": models, **(_partitioned(name) if processes > 1 else {})}
        trainer = make_case(name, processes, **how)
        recorder = _Gradients()
        trainer.add_callback(recorder)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        results[name] = logs, recorder.grads, trainer.evaluate()
        for model in (trainer.model, trainer.teacher_model) if sharded else ():
            assert model is None or any(isinstance(p, DTensor) for p in model.parameters()), name
        trainer.save_model(where)
    return results


def resume(folder: str) -> dict[str, tuple]:
    """For each case the logs of an unbroken run and of one resumed after two of its three steps, sharded, and whether
    all parameters are equal in the end.

    Args:
        folder: for the checkpoints.
    """
    results = {}
    for name in ("plain", "lora", "projector"):
        whole, resumed = (
            make_case(name, 2, **_sharded(os.path.join(folder, name, run)), save_strategy="steps", save_steps=1)
            for run in ("whole", "resumed")
        )
        whole.train()
        resumed.train(resume_from_checkpoint=os.path.join(folder, name, "whole", "checkpoint-2"))
        parameters = [
            [*t.model.parameters(), *(t.projectors.parameters() if t.projectors else ())] for t in (whole, resumed)
        ]
        equal = [torch.equal(_full(one), _full(other)) for one, other in zip(*parameters, strict=True)]
        logs = [[entry for entry in t.state.log_history if "loss" in entry] for t in (whole, resumed)]
        results[name] = *logs, all(equal)
    return results


def _sharded(folder: str) -> dict[str, Any]:
    return {"output_dir": folder, "fsdp": True, "fsdp_config": dict(SHARDING)}


def _partitioned(name: str) -> dict[str, Any]:
    micro = 1 if _CASES[name].get("packing") else 2
    batch = {"train_micro_batch_size_per_gpu": micro, "train_batch_size": 2 * micro, "gradient_accumulation_steps": 1}
    stage = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    config = {"zero_optimization": stage, "zero_allow_untested_optimizer": True, "gradient_clipping": 1e6, **batch}
    return {"deepspeed": config, "use_cpu": False}


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_on_cpu() -> None:
    """Let accelerate use FSDP on a CPU: it reads the plugin for accelerators alone, and would run plain DDP."""
    stock = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def partition_on_cpu() -> None:
    """Let accelerate start DeepSpeed without an accelerator: told to use the CPU, it would leave it out."""
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)


if __name__ == "__main__":
    settle()
    mode, folder, models = sys.argv[1:]
    if mode.startswith("fsdp"):
        shard_on_cpu()
    if mode == "zero":
        partition_on_cpu()
    outcome = resume(folder) if mode == "fsdp resumed" else measure(mode, 2, folder, models)
    if torch.distributed.get_rank() == 0:
        torch.save(outcome, os.path.join(folder, "out.pt"))
    if mode == "ddp":  # while there are two processes
        step = measure_steps(processes=2)
        if torch.distributed.get_rank() == 0:
            torch.save(step, os.path.join(folder, "step.pt"))
    torch.distributed.barrier()  # who leaves early takes the sockets of the other away
    torch.distributed.destroy_process_group()
    # Seen once: torch aborts a process that is done, while the interpreter is taken down.
    sys.stderr.flush()
    os._exit(0)
