"""Builds on the strict device whose bytes are counted phase by phase, and what the dry run predicts of them.

`test_strict_device.py` runs what is a test here, and `python -m tests.device.memory [tuning | held-out | fast]` prints
both for those cases: each in a process of its own.
"""

import functools
import gc
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen3Config

from cbd_trl import BridgeDistillConfig, BridgeDistillTrainer, DistillConfig, build_chain
from cbd_trl.architectures import describe
from cbd_trl.build.plan import plan_chain
from cbd_trl.recipe.memory import Phase, anchor_phases, bridge_phases
from tests.bridge.tokenizers_of_kinds import corpus
from tests.device.backend import install
from tests.device.tensor import USAGE, StrictMode
from tests.tokenizer import WORDS, tiny_tokenizer
from tests.trainers.bridge_runs import students_tokenizer, teachers_tokenizer

CALIBRATION_TOKENS = 512


@dataclass(frozen=True)
class Case:
    """A step of a chain.

    Args:
        family: of its models.
        vocabulary: rows.
        tied: whether input and output share them.
        kind: "depth", "width", "both" or "bridge".
        layers, width, ffn: of the source; a width is cut to half.
        args: of the training.
        dtype: of the weights.
        group: "fast" cases are a default test, "tuning" ones were looked at while the model of memory was written,
            "held-out" ones were not.
    """

    family: str
    vocabulary: int
    tied: bool
    kind: str
    layers: int = 8
    width: int = 128
    ffn: int = 320
    args: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    group: str = "tuning"

    @property
    def name(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.args.items())
        shape = f"{self.layers} x {self.width} x {self.ffn}"
        tied = "tied" if self.tied else "untied"
        return f"{self.kind} {self.family} {self.vocabulary} {tied} {shape} {self.dtype} {options}".strip()

    def config(self, halves: str = "", vocabulary: int | None = None) -> Any:
        """Config of the source, or of a model with half the "layers", "width", or both."""
        return _CONFIGS[self.family](
            vocabulary or self.vocabulary,
            self.layers // (2 if halves in ("depth", "both") else 1),
            *(size // (2 if halves in ("width", "both") else 1) for size in (self.width, self.ffn)),
            self.tied,
        )


def _llama(vocabulary: int, layers: int, width: int, ffn: int, tied: bool, config: Any = LlamaConfig) -> Any:
    return config(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 16,
        num_key_value_heads=max(width // 32, 1), head_dim=16, intermediate_size=ffn, tie_word_embeddings=tied,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def _gpt2(vocabulary: int, layers: int, width: int, ffn: int, tied: bool) -> Any:
    return GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=width // 16, n_inner=ffn, n_positions=256,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def _gpt_neox(vocabulary: int, layers: int, width: int, ffn: int, tied: bool) -> Any:
    return GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 16,
        intermediate_size=ffn, tie_word_embeddings=tied, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


_CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": _llama,
    "qwen3": functools.partial(_llama, config=Qwen3Config),
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}
_WIDTHS = {
    "llama": ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    "qwen3": ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    "gpt2": ("n_embd", "n_inner", "n_head"),
    "gpt_neox": ("hidden_size", "intermediate_size", "num_attention_heads"),
}
_LAYERS = {"gpt2": "n_layer"}
_K, _L = 32_000, 262_144
_WIDE = {"per_device_train_batch_size": 4, "max_length": 128}
_NO_HYBRID, _HYBRIDS = {"swap_probability": 0.0}, {"swap_probability": 1.0}
_CHECKPOINTED = {"gradient_checkpointing": True}
_SMALL: dict[str, Any] = {"layers": 4, "width": 64, "ffn": 160, "group": "fast"}
_HELD_OUT: dict[str, Any] = {"layers": 6, "width": 192, "ffn": 352, "group": "held-out"}
CASES = [
    Case("llama", 2_000, True, "depth", args={**_HYBRIDS, "hidden_weight": 1.0}, **_SMALL),
    Case("gpt2", 2_000, True, "depth", args={"bf16": True, "gradient_accumulation_steps": 2, **_NO_HYBRID}, **_SMALL),
    Case("llama", 2_000, False, "width", **_SMALL),
    Case("gpt_neox", 2_000, False, "both", args=_CHECKPOINTED, **_SMALL),
    Case("gpt2", 2_000, True, "bridge", args={"objective": "alm"}, **_SMALL),
    Case("llama", _L, True, "depth", 4, 16, 32, args={"loss_chunk_size": 16, **_NO_HYBRID}, group="fast"),
    Case("llama", _K, True, "depth", args=_NO_HYBRID),
    Case("llama", _K, True, "depth", args={**_HYBRIDS, "hidden_weight": 1.0, **_WIDE}),
    Case("gpt2", 4_000, True, "depth", args={"bf16": True, "gradient_accumulation_steps": 2, **_WIDE}),
    Case("llama", _L, True, "depth", 8, 32, 64, args={"loss_chunk_size": 32, **_NO_HYBRID}),
    Case("gpt2", _K, True, "bridge", args={"objective": "alm"}),
    Case("gpt_neox", _K, False, "depth", args={"bf16": True, "loss_chunk_size": 64}),
    Case("llama", 4_000, False, "depth", args={**_CHECKPOINTED, **_HYBRIDS, **_WIDE}),
    Case("llama", 4_000, False, "width", args=_WIDE),
    Case("gpt2", _K, True, "both", args=_CHECKPOINTED),
    Case("llama", _K, False, "bridge", args={"objective": "alm", **_WIDE}),
    Case("qwen3", _K, True, "depth", args={"bf16": True, **_HYBRIDS}, **_HELD_OUT),
    Case("gpt2", _K, False, "depth", args={**_CHECKPOINTED, **_HYBRIDS, "max_length": 96}, **_HELD_OUT),
    Case("gpt_neox", _L, True, "depth", 6, 32, 96, args={"loss_chunk_size": 24, **_NO_HYBRID}, group="held-out"),
    Case("qwen3", 8_000, True, "width", args={"bf16": True, **_WIDE}, **_HELD_OUT),
    Case("gpt_neox", _K, False, "width", args={"gradient_accumulation_steps": 2}, **_HELD_OUT),
    Case("llama", 8_000, True, "both", args={"max_length": 96}, **_HELD_OUT),
    Case("gpt_neox", _K, False, "bridge", args={"objective": "alm", **_CHECKPOINTED}, **_HELD_OUT),
    Case("llama", _L, True, "bridge", 4, 32, 64, args={"objective": "alm", "loss_chunk_size": 32}, group="held-out"),
]


def upper_and_anchor(case: Case) -> tuple[Any, dict[str, Any]]:
    fields = [*((_LAYERS.get(case.family, "num_hidden_layers"),) if case.kind != "width" else ())]
    fields += _WIDTHS[case.family] if case.kind in ("width", "both") else ()
    smaller = case.config(case.kind if case.kind != "bridge" else "depth")
    return case.config(), {name: getattr(smaller, name) for name in fields}


def config_of(case: Case, folder: Path, kind: Any = DistillConfig) -> Any:
    options = {
        **{"use_cpu": False, "dataloader_pin_memory": False, "bf16": False, "gradient_checkpointing": False},
        **{"optim": "adamw_torch", "max_steps": 4, "per_device_train_batch_size": 2, "max_length": 64},
        **{"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1},
        "model_init_kwargs": {"dtype": case.dtype},
    }
    return kind(str(folder), **{**options, **case.args})


def rows_of(length: int, words: Sequence[str] = WORDS, count: int = 24) -> Dataset:
    """Rows that fill a training's length, and every other one a little less, so that there is a mask."""
    lengths = [length + 8 - 11 * (i % 2) for i in range(count)]
    return Dataset.from_dict(
        {"text": [" ".join(words[(7 * i + j * j) % len(words)] for j in range(n)) for i, n in enumerate(lengths)]}
    )


@contextmanager
def counted(peaks: dict[str, int]) -> Iterator[None]:
    """Within it the peak of each phase of a build is kept."""
    from cbd_trl.build import build

    places = [
        (build, "choose_blocks", "choose layers"),
        (build, "refit_student", "refit"),
        (build, "train", "train"),
        (build, "store_anchor", "statistics"),
    ]
    kept = [getattr(module, function) for module, function, _ in places]

    def counting(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            USAGE.clear()
            found = function(*args, **kwargs)
            peaks[phase] = USAGE.bytes_peak
            return found

        return call

    for (module, name, phase), function in zip(places, kept, strict=True):
        setattr(module, name, counting(function, phase))
    try:
        yield
    finally:
        for (module, name, _), function in zip(places, kept, strict=True):
            setattr(module, name, function)


def measure(case: Case) -> dict[str, int]:
    """Build the step on the strict device: the most bytes alive there in each phase."""
    peaks: dict[str, int] = {}
    gc.collect()
    others = USAGE.bytes_now
    with tempfile.TemporaryDirectory() as folder, StrictMode(), counted(peaks), torch.random.fork_rng():
        torch.manual_seed(0)
        config, anchor = upper_and_anchor(case)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype)).eval()
        place = Path(folder)
        if case.kind == "bridge":
            teacher = AutoModelForCausalLM.from_config(case.config(vocabulary=case.vocabulary + 64))
            trainer = BridgeDistillTrainer(
                model,
                teacher,
                config_of(case, place, BridgeDistillConfig),
                train_dataset=rows_of(case.args.get("max_length", 64), corpus(0, 400)),
                processing_class=students_tokenizer(),
                teacher_processing_class=teachers_tokenizer(),
            )
            USAGE.clear()
            trainer.train()
            return {"train": USAGE.bytes_peak - others}
        build_chain(
            model,
            [anchor],
            dataset=rows_of(case.args.get("max_length", 64)),
            output_dir=place,
            args=config_of(case, place),
            processing_class=tiny_tokenizer(),
            calibration_tokens=CALIBRATION_TOKENS,
        )
    return {phase: peak - others for phase, peak in peaks.items()}


def predict(case: Case) -> list[Phase]:
    """What the dry run has for the same step."""
    config, anchor = upper_and_anchor(case)
    args = config_of(case, Path("unused"), BridgeDistillConfig if case.kind == "bridge" else DistillConfig)
    source = describe(config)
    if case.kind == "bridge":
        teacher = case.config(vocabulary=case.vocabulary + 64)
        return bridge_phases(teacher, describe(teacher).num_parameters, source, args, CALIBRATION_TOKENS)
    [step] = plan_chain(source, [anchor], args, None)
    return anchor_phases(source, step, CALIBRATION_TOKENS)


def compare(case: Case) -> dict[str, tuple[int, int]]:
    """Phase -> bytes on the device, counted and predicted."""
    peaks = measure(case)
    return {phase.name: (peaks[phase.name], phase.device) for phase in predict(case) if phase.name in peaks}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=() if case.group == "fast" else pytest.mark.slow) for case in CASES],
)
def test_the_memory_of_a_training_is_told_within_15_percent(case: Case) -> None:
    install()
    counted_bytes, predicted = compare(case)["train"]
    assert 0.85 <= predicted / counted_bytes <= 1.15


def main(groups: list[str]) -> None:
    install()
    warnings.simplefilter("ignore")
    disable_progress_bars()
    for case in CASES:
        if groups and not any(group == case.group or group in case.name for group in groups):
            continue
        for phase, (counted_bytes, predicted) in compare(case).items():
            print(f"{case.name} | {phase} | {counted_bytes} | {predicted}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
