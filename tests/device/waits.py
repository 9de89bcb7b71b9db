"""How often a step waits for the device, by objective, run by `test_strict_device.py` in a process of its own.

By hand, which prints the table of docs/results/benchmarks.md: `python -m pytest -n 0 -s tests/device/waits.py`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from cbd_trl.cache import write_cache
from tests.device.backend import install
from tests.device.tensor import USAGE, StrictMode
from tests.tiny import own_names, tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.trainers.bridge_runs import make_bridge, student, students_tokenizer
from tests.training import make_config, make_trainer, text_rows

install()

# What is counted: the last two of four steps of two micro-batches; the first ones check the teacher of a bridge.
RUN: dict[str, Any] = {
    "use_cpu": False,
    "dataloader_pin_memory": False,
    "optim": "adamw_torch",
    "max_steps": 4,
    "logging_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 1.0,
}
COUNTED = 4
MOST = 3.0


class Recorder(TrainerCallback):
    """Counts what is done between the end of the second step and the end of the last."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            USAGE.clear()
        self.waits, self.uploads = (ours(counter) for counter in (USAGE.waits, USAGE.uploads))


def ours(counter: Counter) -> Counter:
    """What cbd_trl itself asked for, not a library that it called or that called it."""
    return Counter({key: times for key, times in counter.items() if key[1].startswith("cbd_trl/")})


@pytest.fixture(autouse=True)
def strict_device() -> Iterator[None]:
    with StrictMode():
        USAGE.clear()
        yield


def deep(layers: int) -> Any:
    return tiny_model("llama", seed=1, **own_names("llama", num_hidden_layers=layers))


def from_cache(folder: Path, kind: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
        write_cache(tiny_model("llama", seed=2), text_rows(), folder, args=make_config(), kind=kind,
                    **({} if kind == "hidden" else {"k": 8}), processing_class=tiny_tokenizer())  # fmt: skip
    return make_trainer(teacher_cache=str(folder), **RUN)


def distill(**how: Any) -> Callable[[Path], Any]:
    return lambda folder: make_trainer(**RUN, **{k: v() if callable(v) else v for k, v in how.items()})


def bridge(objective: str, **how: Any) -> Callable[[Path], Any]:
    return lambda folder: make_bridge(**RUN, objective=objective, **how)


def teachers() -> list[Any]:
    return [tiny_model("llama", seed=2), tiny_model("llama", seed=3)]


CASES: dict[str, Callable[[Path], Any]] = {
    "padded": distill(),
    "padded, chunks of 3": distill(loss_chunk_size=3),
    "packed": distill(packing=True, max_length=16),
    "hidden states of 2 layers": distill(hidden_weight=1.0),
    "hidden states of 4 layers": distill(hidden_weight=1.0, student=lambda: deep(4)),
    "top 8": distill(top_k=8),
    "reverse KL": distill(divergence="reverse_kl"),
    "adaptive KL": distill(divergence="adaptive_kl"),
    "adaptive KL, chunks of 3": distill(divergence="adaptive_kl", loss_chunk_size=3),
    "two teachers": distill(teacher=teachers),
    "hybrids": distill(swap_probability=1.0, hidden_weight=1.0),
    "cached top-k": lambda folder: from_cache(folder, "top_k"),
    "cached hidden states": lambda folder: from_cache(folder, "hidden"),
    **{f"bridge, {name}": bridge(name) for name in ("alm", "uld", "shared", "alm=1,uld=0.5", "dskd-cma", "prefix")},
    **{
        f"bridge, {name}, chunks of 5": bridge(name, loss_chunk_size=5)
        for name in ("alm", "uld", "shared", "dskd-cma", "prefix")
    },
    "bridge, alm, hidden states": bridge("alm", hidden_weight=1.0, hidden_projector=True),
    "bridge, prefix, packed": bridge("prefix", packing=True, max_length=48),
}


@pytest.mark.parametrize("name", CASES)
def test_waits(name: str, tmp_path: Path) -> None:
    trainer, recorder = CASES[name](tmp_path), Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    waits, uploads = (counter.total() / COUNTED for counter in (recorder.waits, recorder.uploads))
    print(f"\n| {name} | {waits:g} | {uploads:g} |")
    for counter in (recorder.waits, recorder.uploads):
        for key, n in counter.most_common(60):
            print("   ", n, key)
    assert waits + uploads <= MOST
