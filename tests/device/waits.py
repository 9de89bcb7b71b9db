"""How often the host waits for the device in a micro-batch, run by `test_strict_device.py` in a process of its own.

By hand, which prints the table of docs/results/benchmarks.md: `python -m pytest -n 0 -sq tests/device/waits.py`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from transformers import TrainerCallback

from cbd_trl.cache import write_cache
from tests.device.backend import install
from tests.device.tensor import USAGE, StrictMode
from tests.tiny import own_names, tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.trainers.bridge_runs import make_bridge
from tests.training import make_config, make_trainer, text_rows

# The cached teacher runs before, on the CPU.
CACHES = {"top_k": {"k": 8}, "hidden": {}}

# Steps of two micro-batches. Two of them come before what is counted: there a bridge still checks its teacher.
STEPS: dict[str, Any] = {
    "use_cpu": False,
    "dataloader_pin_memory": False,
    "optim": "adamw_torch",
    "max_steps": 4,
    "logging_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 1.0,
}
EVALUATION: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 4,
    "per_device_eval_batch_size": 2,
    "eval_dataset": text_rows((4, 7, 2, 8, 5, 3), seed=3),
}
MOST = 3


class Recorder(TrainerCallback):
    """Counts what cbd_trl itself asked for in the steps behind the second, and in the batches of an evaluation.

    Attributes:
        training: waits and uploads of a micro-batch; uploads are copies that are not of the batch itself.
        evaluation: likewise.
    """

    def __init__(self) -> None:
        self.training = self.evaluation = (0.0, 0.0)
        self._batches = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            USAGE.clear()
        elif state.global_step == 4:
            self.training = _per_batch(2 * args.gradient_accumulation_steps)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._batches:
            USAGE.clear()
        else:
            self.evaluation = _per_batch(self._batches)
        self._batches += 1


def _per_batch(batches: int) -> tuple[float, float]:
    return _ours(USAGE.waits) / batches, _ours(USAGE.uploads) / batches


def _ours(counter: Counter[tuple[str, str]]) -> int:
    return sum(times for (_, place), times in counter.items() if place.startswith("cbd_trl/"))


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Written before there is a second device."""
    made = {}
    for kind, how in CACHES.items():
        folder = tmp_path_factory.mktemp(kind)
        write_cache(
            tiny_model("llama", seed=2), text_rows(), folder, args=make_config(), kind=kind,
            processing_class=tiny_tokenizer(), **how,
        )  # fmt: skip
        made[kind] = str(folder)
    install()
    return made


@pytest.fixture(autouse=True)
def strict_device(caches: dict[str, str]) -> Iterator[None]:
    with StrictMode():
        USAGE.clear()
        yield


def wide(layers: int = 2) -> dict[str, Any]:
    """A student of so many layers and a teacher of four, of more tokens than a divergence looks at first."""
    depth = own_names("llama", num_hidden_layers=layers)
    return {
        "student": tiny_model("llama", seed=1, vocab_size=300, **depth),
        "teacher": tiny_model("llama", seed=2, vocab_size=300),
    }


def distill(**how: Any) -> Callable[[dict[str, str]], Any]:
    return lambda caches: make_trainer(**{**STEPS, **wide(), **how})


def from_cache(kind: str) -> Callable[[dict[str, str]], Any]:
    return lambda caches: make_trainer(**STEPS, teacher_cache=caches[kind])


def bridge(**how: Any) -> Callable[[dict[str, str]], Any]:
    return lambda caches: make_bridge(**{**STEPS, **how})


HIDDEN = {"hidden_weight": 1.0}
MAKE: dict[str, Callable[[dict[str, str]], Any]] = {
    "padded rows": distill(),
    "padded rows, chunks of 3": distill(loss_chunk_size=3),
    "packed rows": distill(packing=True, max_length=16),
    "hidden states of 2 layers": distill(**HIDDEN),
    "hidden states of 4 layers": lambda caches: make_trainer(**{**STEPS, **wide(4), **HIDDEN}),
    "top_k": distill(top_k=8),
    "reverse KL": distill(divergence="reverse_kl"),
    "adaptive KL": distill(divergence="adaptive_kl"),
    "adaptive KL, chunks of 3": distill(divergence="adaptive_kl", loss_chunk_size=3),
    "two teachers": distill(teacher=[tiny_model("llama", seed=seed, vocab_size=300) for seed in (2, 3)]),
    "hybrids at every step": distill(swap_probability=1.0, **HIDDEN),
    "a cache of top-k": from_cache("top_k"),
    "a cache of hidden states": from_cache("hidden"),
    "bridge: alm": bridge(objective="alm"),
    "bridge: alm, chunks of 5": bridge(objective="alm", loss_chunk_size=5),
    "bridge: alm, hidden states": bridge(objective="alm", hidden_projector=True, **HIDDEN),
    "bridge: alm, packed rows": bridge(objective="alm", packing=True, max_length=48),
    "bridge: uld": bridge(objective="uld"),
    "bridge: uld, chunks of 5": bridge(objective="uld", loss_chunk_size=5),
    "bridge: shared": bridge(objective="shared"),
    "bridge: shared, chunks of 5": bridge(objective="shared", loss_chunk_size=5),
    "bridge: dskd-cma": bridge(objective="dskd-cma"),
    "bridge: dskd-cma, chunks of 5": bridge(objective="dskd-cma", loss_chunk_size=5),
    "bridge: prefix": bridge(objective="prefix"),
    "bridge: prefix, chunks of 5": bridge(objective="prefix", loss_chunk_size=5),
}
EVALUATED: dict[str, Callable[[dict[str, str]], Any]] = {
    "evaluation": distill(**HIDDEN, **EVALUATION),
    "evaluation, packed rows": distill(packing=True, max_length=16, **EVALUATION),
}


def measure(make: Callable[[dict[str, str]], Any], caches: dict[str, str]) -> Recorder:
    trainer, recorder = make(caches), Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    return recorder


# One of each kind of loop; the others take a minute.
QUICK = {
    "hidden states of 4 layers",
    "adaptive KL, chunks of 3",
    "a cache of top-k",
    "bridge: alm, hidden states",
    "bridge: shared, chunks of 5",
    "bridge: prefix, chunks of 5",
}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MAKE]
)
def test_a_micro_batch_waits_as_rarely_as_it_can(name: str, caches: dict[str, str]) -> None:
    waits, uploads = measure(MAKE[name], caches).training
    print(f"\n| {name} | {waits:g} | {uploads:g} |")
    # One number an optimizer step is read, whether the loss is finite, and each has two micro-batches.
    assert (waits, uploads) == (0.5, 0), f"{USAGE.waits} {USAGE.uploads}"
    assert waits + uploads <= MOST


@pytest.mark.parametrize("name", EVALUATED)
def test_a_batch_of_an_evaluation(name: str, caches: dict[str, str]) -> None:
    waits, uploads = measure(EVALUATED[name], caches).evaluation
    print(f"\n| {name} | {waits:g} | {uploads:g} |")
    assert (waits, uploads) == (0, 0), f"{USAGE.waits} {USAGE.uploads}"
