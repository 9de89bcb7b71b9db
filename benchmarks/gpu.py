"""What this package costs on your accelerator, in one command and under 8 minutes on an 80 GB GPU.

    python -m benchmarks.gpu [--output FILE] [--sections trainers,build,from_chain] [--minutes 8] [--toy]

Models and rows are random and made where they are needed: no network, no data. A Markdown file holds one table, which
is written anew after each row: whatever ends the run, the rows so far stand, and the same command goes on behind them.
A row that runs out of memory or lacks a package says so, and the next one runs. Sizes follow from the memory of the
device.

trainers    One optimizer step over the same rows, Qwen3's shapes, vocabulary 151,936: teacher in bfloat16, student in
            float32 under bfloat16 autocast, AdamW, no gradient checkpointing. Medians over the timed steps.
            bound     teacher forward with head (dropped), student forward with head and cross-entropy, backward,
                      AdamW, in a plain loop over full causal rows: nothing else.
            ours      `DistillTrainer`: packing, forward KL + 0.5 cross-entropy.
            trl-gkd   TRL's experimental `GKDTrainer(lmbda=0, beta=0)`: forward KL alone; it cannot pack. Each step has
                      the rows of about as many tokens, padded to the longest.
            A step that does not fit in one forward pass is split in as many as it takes. Above: the peak without
            models, gradients and optimizer (`benchmarks/meter.py`).
build       `build_chain` of a bfloat16 source, a step in depth and a step in width, phase by phase.
from_chain  A model between two anchors of an 8B model's width, on the CPU as it is made; as many of its layers as
            memory, disk and the minutes left allow.
"""

import argparse
import gc
import importlib
import math
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from accelerate import PartialState
from datasets import disable_progress_bars
from transformers.utils import is_flash_attn_2_available, logging
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from benchmarks.meter import DeviceMemory, HostMemory, Meter, train_metered
from benchmarks.random_chain import write_random_chain
from benchmarks.random_models import PAD, qwen3, random_model, random_rows, two_token_tokenizer
from benchmarks.tables import gigabytes, packages, processor
from benchmarks.workload import LEARNING_RATE, PACKS_PER_STEP, ROWS_PER_STEP, plain_settings
from cbd_trl import DistillConfig, DistillTrainer, build_chain, from_chain
from cbd_trl.architectures import decoder_layers, describe
from cbd_trl.utils.files import Results, write_text
from cbd_trl.utils.formatting import format_count, markdown_table


@dataclass(frozen=True)
class Sizes:
    """What is measured on a device of some memory.

    Args:
        memory: GB that the device has at least.
        teacher, student: arguments of `qwen3` (layers, width, ffn, key/value heads), vocabulary and heads apart.
        length: tokens of a pack.
        source: of the chain that is built.
        depth: layers of its second anchor.
        narrow: width, ffn and key/value heads of its third.
        steps: optimizer steps of each anchor.
        large: three shapes of one depth for from_chain: upper anchor, target, lower anchor.
        common: vocabulary, and the size of a head where it is not Qwen3's.
    """

    memory: float
    teacher: tuple[int, int, int, int]
    student: tuple[int, int, int, int]
    length: int
    source: tuple[int, int, int, int]
    depth: int
    narrow: tuple[int, int, int]
    steps: int = 8
    large: tuple[tuple[int, int, int, int], ...] = (
        (36, 4096, 12288, 8),
        (36, 3584, 10752, 7),
        (36, 3072, 9216, 6),
    )
    common: dict[str, int] = field(default_factory=lambda: {"vocabulary": 151_936})

    def config(self, shape: tuple[int, int, int, int], **others: Any) -> Any:
        """A config of one of the shapes."""
        return qwen3(*shape, **{"tied": True, **self.common, **others})


_1_7B, _0_6B = (28, 2048, 6144, 8), (28, 1024, 3072, 8)
SIZES = (
    Sizes(60, _1_7B, _0_6B, 4096, _1_7B, 20, (1536, 4608, 6)),
    Sizes(36, _1_7B, _0_6B, 2048, _1_7B, 20, (1536, 4608, 6)),
    Sizes(0, _0_6B, (14, 1024, 3072, 8), 1024, _0_6B, 20, (768, 2304, 6)),
)
TOY = Sizes(
    0,
    (4, 32, 64, 2),
    (2, 32, 64, 2),
    64,
    (4, 32, 64, 2),
    3,
    (16, 32, 1),
    2,
    ((2, 48, 96, 3), (2, 32, 64, 2), (2, 16, 32, 1)),
    {"vocabulary": 512, "head": 8},
)


class OutOfTimeError(Exception):
    """The minutes are over."""


class Bench:
    """The device, the clock and the table.

    Args:
        options: of the command line.
        device: to measure on.
    """

    header = (
        "section",
        "what",
        "attention",
        "s",
        "tokens/s",
        "GB on the device",
        "above",
        "GB of the host",
        "remarks",
    )

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        self.sizes = TOY if options.toy else next(sizes for sizes in SIZES if sizes.memory <= _memory(device))
        self.attention = options.attention or ("flash_attention_2" if self._flash() else None)
        self.output: Path = options.output
        self._begun = time.monotonic()
        self._results = Results(self.output.with_suffix(".json"))
        # Rows are comparable where everything that makes them what they are is the same.
        self._settings = " | ".join(map(str, (_name(device), packages(), self.sizes, self.attention, options.steps)))
        self._rows: dict[str, dict[str, Any]] = self._results.get(self._settings) or {}

    def _flash(self) -> bool:
        return self.device.type == "cuda" and is_flash_attn_2_available()

    @property
    def on_host(self) -> bool:
        """Whether there is no accelerator."""
        return self.device.type == "cpu"

    def memory(self) -> HostMemory | DeviceMemory:
        """What a trainer's memory is measured with."""
        return HostMemory() if self.on_host else DeviceMemory(self.device)

    @property
    def fused(self) -> bool:
        """Whether torch has AdamW in one kernel for the device."""
        return self.device.type in ("cpu", "cuda", "mps", "xpu")

    @property
    def steps(self) -> int:
        """Optimizer steps of a trainer, the warm-up with them."""
        return self.options.warm_up + self.options.steps

    @contextmanager
    def measured(self, row: dict[str, Any]) -> Iterator[None]:
        """Fill in seconds and both peaks of what is done within."""
        host, device = HostMemory(), None if self.on_host else DeviceMemory(self.device)
        if device is not None:
            device.synchronize()
            device.start()
        host.start()
        start = time.perf_counter()
        try:
            yield
        finally:
            if device is not None:
                device.synchronize()
            row["seconds"] = time.perf_counter() - start
            row["host_bytes"] = host.stop()
            row["device_bytes"] = None if device is None else device.stop()

    @property
    def seconds_left(self) -> float:
        """Until the minutes are over."""
        return 60 * self.options.minutes - (time.monotonic() - self._begun)

    def done(self, section: str, name: str) -> bool:
        """Whether a row is there already, and is not that of a failure."""
        return not self._rows.get(f"{section}: {name}", {"failed": True}).get("failed")

    def put(self, section: str, name: str, **found: Any) -> None:
        """Add a row or write it anew, and the file with it."""
        row = self._rows[f"{section}: {name}"] = {"section": section, "name": name, **found}
        self._results.put(self._settings, self._rows)
        write_text(self.output, self.text())
        print("  ".join(filter(None, _cells(row))), flush=True)

    def row(self, section: str, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a row, unless an earlier run did; whatever goes wrong is in it, and the next run tries again."""
        if self.done(section, name):
            return
        try:
            if self.seconds_left < 0:
                raise OutOfTimeError
            self.put(section, name, **measure())
        except Exception as error:
            self.put(section, name, failed=True, remarks=self._reason(error))
        self.release()

    def _reason(self, error: Exception) -> str:
        if isinstance(error, OutOfTimeError):
            return f"not measured: the {self.options.minutes:g} minutes were over"
        if isinstance(error, torch.OutOfMemoryError):
            return "out of memory"
        traceback.print_exception(error)
        return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"

    def release(self) -> None:
        """Give back what a measurement leaves behind."""
        gc.collect()
        if not self.on_host:
            torch.get_device_module(self.device).empty_cache()

    def text(self) -> str:
        """The file."""
        rows = [row for section in SECTIONS for row in self._rows.values() if row["section"] == section]
        sides = ["left"] * 3 + ["right"] * 5 + ["left"]
        table = markdown_table(self.header, [_cells(row, rows) for row in rows], sides)
        return (
            f"# cbd_trl on {_name(self.device)}\n\n"
            f"{_memory(self.device):.0f} GB on the device; {processor()}, {torch.get_num_threads()} threads; "
            f"{packages()}, Python {platform.python_version()}, CUDA {torch.version.cuda or 'none'}\n\n"
            f"    {self.options.command}\n\n{self._sizes()}\n\n{table}"
        )

    def _sizes(self) -> str:
        sizes = self.sizes
        teacher, student, source = (
            format_count(describe(sizes.config(shape)).num_parameters)
            for shape in (sizes.teacher, sizes.student, sizes.source)
        )
        return (
            f"Teacher {teacher}, student {student}, {PACKS_PER_STEP} x {sizes.length:,} tokens a step, vocabulary "
            f"{sizes.common['vocabulary']:,}; a chain from {source}, calibrated on {_calibration(sizes):,} tokens."
        )


def _cells(row: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> list[str]:
    def number(name: str, show: Callable[[float], str]) -> str:
        return show(row[name]) if row.get(name) is not None else ""

    return [
        row["section"],
        row["name"],
        row.get("attention") or "",
        number("seconds", lambda value: f"{value:.2f}" if value < 100 else f"{value:.0f}"),
        number("tokens_per_second", lambda value: f"{value:,.0f}"),
        number("device_bytes", gigabytes),
        number("above_bytes", gigabytes),
        number("host_bytes", gigabytes),
        "; ".join(filter(None, [row.get("remarks"), *_ratios(row, rows or [])])),
    ]


def _ratios(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Ours against the others of the section."""
    if (row["section"], row["name"]) != ("trainers", "ours") or "tokens_per_second" not in row:
        return []
    found = []
    for other in rows:
        if other["section"] == "trainers" and other is not row and "tokens_per_second" in other:
            speed = row["tokens_per_second"] / other["tokens_per_second"]
            memory = row["above_bytes"] / other["above_bytes"] if other["above_bytes"] > 0 else math.nan
            found.append(f"{speed:.2f} times the speed of {other['name']}, {memory:.2f} times its memory above")
    return found


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor() if device.type == "cpu" else device.type


def _memory(device: torch.device) -> float:
    """GB of a device; 0 where torch does not say."""
    with suppress(AttributeError):
        return torch.get_device_module(device).get_device_properties(device).total_memory / 1e9
    return 0.0


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# Trainers.


def trainers(bench: Bench, work: Path) -> None:
    """The bound, ours and TRL's, each in as few forward passes a step as fit."""
    for name, (train, ways) in CONTESTANTS.items():
        bench.row("trainers", name, lambda train=train, ways=ways: _in_fewest_passes(bench, train, ways, work))


def _in_fewest_passes(
    bench: Bench, train: Callable[..., dict[str, Any]], ways: tuple[int, ...], work: Path
) -> dict[str, Any]:
    for passes in ways:
        with suppress(torch.OutOfMemoryError):
            found = train(bench, work, passes)
            return {
                "seconds": found["seconds_per_step"],
                "tokens_per_second": found["tokens_per_second"],
                "host_bytes" if bench.on_host else "device_bytes": found["peak_bytes"],
                "above_bytes": found["above_bytes"],
                "attention": found["attention"],
                "remarks": f"a step in {passes} forward passes" if passes > 1 else "",
            }
        # Only now does no traceback keep activations.
        bench.release()
    raise torch.OutOfMemoryError


def _teacher(bench: Bench) -> Any:
    config = bench.sizes.config(bench.sizes.teacher)
    return random_model(config, torch.bfloat16, bench.device, bench.attention).eval().requires_grad_(False)


def _student(bench: Bench) -> Any:
    config = bench.sizes.config(bench.sizes.student)
    return random_model(config, torch.float32, bench.device, bench.attention).train()


def _rows(bench: Bench, steps: int) -> Any:
    """Rows of which `ROWS_PER_STEP` are a little less than the packs of a step: 5/16 of a pack each on average."""
    length = bench.sizes.length
    lengths = length // 8, length // 2
    return random_rows((ROWS_PER_STEP + 1) * steps, lengths, bench.sizes.common["vocabulary"])


def _settings(bench: Bench, work: Path, steps: int, per_step: int, passes: int) -> dict[str, Any]:
    return {
        **plain_settings(work / "trainer", steps, per_step // passes, passes),
        "max_length": bench.sizes.length,
        "bf16": True,
        "use_cpu": bench.on_host,
        "optim": "adamw_torch_fused" if bench.fused else "adamw_torch",
        "dataloader_pin_memory": bench.device.type == "cuda",
        "train_sampling_strategy": "sequential",
    }


def _train(bench: Bench, trainer: Any) -> dict[str, Any]:
    with _attention_of(trainer.model) as seen:
        found = train_metered(trainer, Meter(bench.options.warm_up, bench.memory()))
    return {**found, "attention": ", ".join(sorted(seen))}


@contextmanager
def _attention_of(model: Any) -> Iterator[set[str]]:
    """The implementations that the first layer attends with: a trainer may exchange the one it was given."""
    seen: set[str] = set()
    layer = decoder_layers(model)[0]
    hook = layer.register_forward_pre_hook(lambda *_: seen.add(model.config._attn_implementation))
    try:
        yield seen
    finally:
        hook.remove()


def _ours(bench: Bench, work: Path, passes: int) -> dict[str, Any]:
    settings = _settings(bench, work, bench.steps, PACKS_PER_STEP, passes)
    trainer = DistillTrainer(
        _student(bench),
        _teacher(bench),
        DistillConfig(**settings, packing=True, kd_weight=1.0, ce_weight=0.5),
        _rows(bench, bench.steps),
        processing_class=two_token_tokenizer(),
    )
    return _train(bench, trainer)


def _gkd(bench: Bench, work: Path, passes: int) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental
        from trl.experimental.gkd import GKDConfig, GKDTrainer

    rows = _rows(bench, bench.steps)
    trainer = GKDTrainer(
        _student(bench),
        _teacher(bench),
        GKDConfig(**_settings(bench, work, bench.steps, ROWS_PER_STEP, passes), lmbda=0.0, beta=0.0, temperature=1.0),
        data_collator=DataCollatorForLanguageModeling(pad_token_id=PAD),
        train_dataset=rows.add_column("labels", rows["input_ids"][:]),
        processing_class=two_token_tokenizer(),
    )
    return _train(bench, trainer)


def _bound(bench: Bench, work: Path, passes: int) -> dict[str, Any]:
    student, teacher = _student(bench), _teacher(bench)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=bench.fused)
    shape, vocabulary = (PACKS_PER_STEP, bench.sizes.length), bench.sizes.common["vocabulary"]
    meter = Meter(bench.options.warm_up, bench.memory())
    with _attention_of(student) as seen:
        meter.begin()
        for _ in range(bench.steps):
            ids = torch.randint(2, vocabulary, shape).to(bench.device)
            for part in ids.chunk(passes):
                (_bound_loss(bench, student, teacher, part) / ids[:, 1:].numel()).backward()
            meter.tokens += ids.numel()
            optimizer.step()
            optimizer.zero_grad()
            meter.step_done()
    return {**meter.result(student), "attention": ", ".join(sorted(seen))}


def _bound_loss(bench: Bench, student: Any, teacher: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast(bench.device.type, torch.bfloat16):
        with torch.no_grad():
            teacher(input_ids=ids, use_cache=False)
        logits = student(input_ids=ids, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


# How each trains, and the numbers of forward passes that its step can be split in.
CONTESTANTS: dict[str, tuple[Callable[[Bench, Path, int], dict[str, Any]], tuple[int, ...]]] = {
    "bound": (_bound, (1, 2)),
    "ours": (_ours, (1, 2)),
    "trl-gkd": (_gkd, (1, 2, 3, 6)),
}


# Building.

# Where build_chain calls its phases, and what they are called here.
PHASES = {
    "cbd_trl.build.source_anchor": {"_sorted": "sort"},
    "cbd_trl.build.build": {
        "choose_blocks": "block search",
        "initial_student": "cut",
        "refit_student": "refit",
        "train": "train",
    },
    # Weights of the source are permuted as they are written.
    "cbd_trl.build.store": {"save_statistics": "statistics", "save_stock_model": "save"},
}


class Phases:
    """Seconds and peaks of the phases of a build, a row each as soon as it is over.

    Args:
        bench: takes the rows.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._anchors = ["source", "depth step", "width step"]
        self.found: dict[str, dict[str, Any]] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it build_chain is measured."""
        with ExitStack() as patches:
            for module_name, functions in PHASES.items():
                module = importlib.import_module(module_name)
                for function, phase in functions.items():
                    measured = self._measured(getattr(module, function), phase)
                    patches.enter_context(mock.patch.object(module, function, measured))
            yield

    def _measured(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(f"{self._anchors[0]}: {phase}") as row:
                result = function(*args, **kwargs)
            if tokens := getattr(result, "tokens_seen", 0) if phase == "train" else 0:
                self._put(f"{self._anchors[0]}: {phase}", {**row, "tokens_per_second": tokens / row["seconds"]})
            if phase == "save":
                del self._anchors[0]
            return result

        return call

    @contextmanager
    def phase(self, name: str) -> Iterator[dict[str, Any]]:
        """Measure a phase, which may come in several parts."""
        if self._bench.seconds_left < 0:
            raise OutOfTimeError
        before = self.found.get(name, {})
        row: dict[str, Any] = {}
        with self._bench.measured(row):
            yield row
        row["seconds"] += before.get("seconds", 0.0)
        for peak in ("device_bytes", "host_bytes"):
            row[peak] = max(filter(None, (row[peak], before.get(peak))), default=None)
        self._put(name, row)

    def _put(self, name: str, row: dict[str, Any]) -> None:
        self.found[name] = row
        self._bench.put("build", name, **row)


def build(bench: Bench, work: Path) -> None:
    """A chain of three anchors."""
    bench.row("build", "whole", lambda: _build(bench, Phases(bench), work))


def _build(bench: Bench, phases: Phases, work: Path) -> dict[str, Any]:
    sizes = bench.sizes
    width, ffn, groups = sizes.narrow
    anchors = [{"num_hidden_layers": sizes.depth}, {**_width(width, ffn, groups)}]
    rows = _rows(bench, sizes.steps)
    source = random_model(sizes.config(sizes.source), torch.bfloat16, bench.device, bench.attention).cpu()
    bench.release()
    start = time.perf_counter()
    with phases.watched():
        chain = build_chain(
            source,
            anchors,
            dataset=rows,
            output_dir=work / "chain",
            args=DistillConfig(**_settings(bench, work, sizes.steps, PACKS_PER_STEP, 1), packing=True),
            processing_class=two_token_tokenizer(),
            calibration_tokens=_calibration(sizes),
        )
    seconds = time.perf_counter() - start
    del source
    with phases.phase("from_chain, calibrated"):
        between = _width((width + sizes.source[1]) // 2, (ffn + sizes.source[2]) // 2, (groups + sizes.source[3]) // 2)
        from_chain(chain, config={"num_hidden_layers": sizes.depth, **between}, calibration_dataset=rows)
    return {
        "seconds": seconds,
        "device_bytes": _highest(phases, "device_bytes"),
        "host_bytes": _highest(phases, "host_bytes"),
        "remarks": f"{' → '.join(format_count(anchor.num_parameters) for anchor in chain.anchors)}, "
        f"{sizes.steps} steps an anchor",
    }


def _highest(phases: Phases, peak: str) -> int | None:
    return max(filter(None, (row[peak] for row in phases.found.values())), default=None)


def _width(width: int, ffn: int, groups: int, queries: int = 2) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_attention_heads": groups * queries,
        "num_key_value_heads": groups,
    }


def _calibration(sizes: Sizes) -> int:
    return min(8192, 8 * sizes.length)


# Making a model.

# To write, hash and cut a layer of an 8B chain's width, on few cores: fewer layers are measured where time is short.
_SECONDS_PER_LAYER = 8


def between(bench: Bench, work: Path) -> None:
    """A model between two anchors of the width of an 8B model."""
    bench.row("from_chain", "width, nested", lambda: _between(bench, work))


def _between(bench: Bench, work: Path) -> dict[str, Any]:
    queries = 4 if bench.sizes is not TOY else 2
    layers = _layers_that_fit(bench, work, queries)
    upper, _, lower = [
        bench.sizes.config((layers, *shape[1:]), queries=queries, tied=False) for shape in bench.sizes.large
    ]
    start = time.perf_counter()
    write_random_chain(work / "large", [upper, lower], torch.bfloat16, bench.device)
    written = time.perf_counter() - start
    bench.release()
    row: dict[str, Any] = {}
    _, width, ffn, groups = bench.sizes.large[1]
    with bench.measured(row):
        model = from_chain(work / "large", config=_width(width, ffn, groups, queries))
    size = sum(file.stat().st_size for file in (work / "large").rglob("*") if file.is_file())
    remarks = (
        f"{format_count(model.num_parameters())} parameters, {layers} of {bench.sizes.large[0][0]} layers; the chain, "
        f"{gigabytes(size)} GB, written in {written:.0f} s before"
    )
    return {**row, "remarks": remarks}


def _layers_that_fit(bench: Bench, work: Path, queries: int) -> int:
    """As many of all layers as the disk, the host's memory and the minutes left allow."""
    shapes = bench.sizes.large
    upper, _, lower = [
        2 * describe(bench.sizes.config(shape, queries=queries, tied=False)).num_parameters for shape in shapes
    ]
    # Statistics take up to 0.3 of the upper anchor; the upper anchor is whole in memory while it is written.
    disk = shutil.disk_usage(work).free / (1.4 * (upper + lower))
    memory = _host_memory() / (2 * upper)
    minutes = bench.seconds_left / (_SECONDS_PER_LAYER * shapes[0][0])
    layers = int(shapes[0][0] * min(1.0, disk, memory, minutes))
    if layers < 2:
        raise RuntimeError(
            f"no room for 2 layers: {disk:.0%} of the disk, {memory:.0%} of the memory and {minutes:.0%} of the time "
            "that all take are there; pass --work DIR or --minutes"
        )
    return layers


SECTIONS = {"trainers": trainers, "build": build, "from_chain": between}


def main(arguments: list[str] | None = None) -> None:
    """Measure.

    Args:
        arguments: of the command line; None for those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-benchmark.md"), help="the table; .json beside it")
    parser.add_argument("--sections", type=lambda text: text.split(","), default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=8.0, help="nothing is begun after them")
    parser.add_argument("--steps", type=int, default=10, help="timed optimizer steps of a trainer")
    parser.add_argument("--warm-up", type=int, default=3, help="optimizer steps before them")
    parser.add_argument("--attention", help="attn_implementation (default: FlashAttention 2 if installed, else SDPA)")
    parser.add_argument("--work", type=Path, help="folder for chains, up to 40 GB (default: the temporary one)")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, on the CPU too: tries the benchmark out")
    options = parser.parse_args(arguments)
    options.command = shlex.join(
        ["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)]
    )
    if unknown := sorted(set(options.sections) - set(SECTIONS)):
        parser.error(f"--sections names {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    device = PartialState().device
    if device.type == "cpu" and not options.toy:
        parser.error("torch finds no accelerator here; --toy tries the benchmark out on the CPU")
    if torch.cuda.device_count() > 1:
        # A Trainer would split each batch between them.
        parser.error(f"{torch.cuda.device_count()} GPUs are visible, and one is measured: set CUDA_VISIBLE_DEVICES=0")
    disable_progress_bars()
    logging.disable_progress_bar()
    bench = Bench(options, device)
    for section in options.sections:
        if options.work is not None:
            options.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            SECTIONS[section](bench, Path(work))
    print(f"\n{bench.text()}")


if __name__ == "__main__":
    main()
