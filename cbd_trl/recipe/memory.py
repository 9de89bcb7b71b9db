"""Predict the memory of each phase of a build, on any device.

Weights, gradients and the optimizer's states are counted by their shapes. What a training step keeps and needs beside
them is counted by running it on tensors without data (`recipe/trace.py`), by a few of the layers: every further layer
takes as much as one of them.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from cbd_trl.architectures import Architecture, decoder_layers, describe
from cbd_trl.architectures.axes import axis_length
from cbd_trl.architectures.backbone import open_forward
from cbd_trl.architectures.base import learned_positions
from cbd_trl.bridge.objectives.inputs import chunked_cross_entropy, compared_terms
from cbd_trl.build.plan import Step
from cbd_trl.build.public_anchor import PAIRING_TOKENS
from cbd_trl.build.store import CALIBRATION_BATCH
from cbd_trl.build.student import FIT_TOKENS
from cbd_trl.build.width_hybrid import WidthHybrid, targets_between, weights_of_teacher
from cbd_trl.losses.divergences import get_divergence
from cbd_trl.losses.fused import default_chunk, fused_terms
from cbd_trl.losses.objective import DistillObjective, TermWeights
from cbd_trl.losses.reduction import Scored
from cbd_trl.recipe.trace import FUSED, Bytes, traced
from cbd_trl.surgery.align import paired_sites
from cbd_trl.surgery.block_search import measured_blocks
from cbd_trl.surgery.blocks import spaced_blocks, spaced_layers
from cbd_trl.surgery.least_squares import cut_fits
from cbd_trl.surgery.refit import refit_layers
from cbd_trl.surgery.statistics import FACTORIZING, RIDGE, collect_statistics
from cbd_trl.targets.operators import Pair
from cbd_trl.teachers.local import Batch, EnsembleTeacher, LocalTeacher
from cbd_trl.trainers.bridge_config import HIDDEN_WEIGHT, BridgeDistillConfig
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.trainers.hidden_states import LayerPairs
from cbd_trl.trainers.hybrid import Pass
from cbd_trl.trainers.model_setup import make_objective
from cbd_trl.trainers.step_loss import StepLoss
from cbd_trl.utils.blocks import calibration_length


@dataclass(frozen=True)
class Phase:
    """What a phase of a build takes at most.

    Args:
        name: of the phase.
        device: bytes on the device that trains, without the libraries' own.
        host: bytes in the machine's memory, likewise; 0 where that is the device.
    """

    name: str
    device: int
    host: int = 0


@dataclass(frozen=True)
class _Run:
    """What a training is run with.

    Attributes:
        args: of the training.
        device: that it is run on.
        dtype: of the weights.
        teacher_dtype: of the teacher's.
        second: that teaches beside the first teacher.
    """

    args: DistillConfig
    device: torch.device
    dtype: torch.dtype
    teacher_dtype: torch.dtype
    second: Architecture | None = None

    @property
    def half(self) -> torch.dtype | None:
        return torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def weights(self, parameters: int) -> int:
        return parameters * self.dtype.itemsize

    def phase(self, name: str, device: int, host: int) -> Phase:
        return Phase(name, device, 0 if self.on_cpu else host)

    def model(self, config: PretrainedConfig, dtype: torch.dtype | None = None) -> Any:
        """A model without data, in the dtype of the weights unless another is given."""
        config = copy.deepcopy(config)
        # The default: what an expert gets without a kernel for all of them depends on values.
        config._experts_implementation = None
        options = self.args.model_init_kwargs
        eager = isinstance(options, dict) and options.get("attn_implementation") == "eager"
        cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        eager = eager or not cls._supports_sdpa
        attention = "eager" if eager else FUSED
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype or self.dtype, attn_implementation=attention)
        open_forward(model)
        return model


def weight_dtype(args: DistillConfig, config: PretrainedConfig) -> torch.dtype:
    """The dtype of the weights: float32 unless the source is loaded otherwise.

    Args:
        args: of the training.
        config: of an anchor: "auto" is the dtype that the source's has.
    """
    options = args.model_init_kwargs
    kind = options.get("dtype") if isinstance(options, dict) else None
    kind = config.dtype if kind == "auto" else kind
    found = getattr(torch, str(kind).removeprefix("torch."), None)
    return found if found in (torch.bfloat16, torch.float16) else torch.float32


def count_parameters(config: PretrainedConfig) -> int:
    """Count the parameters of a model of any architecture, on one without memory."""
    try:
        return describe(config).num_parameters
    except ValueError:
        with torch.device("meta"):
            return int(AutoModelForCausalLM.from_config(config).num_parameters())


def _run(
    args: DistillConfig,
    device: torch.device | None,
    config: PretrainedConfig,
    teacher_dtype: torch.dtype | None = None,
) -> _Run:
    dtype = weight_dtype(args, config)
    return _Run(args, device or args.device, dtype, teacher_dtype or dtype)


def source_phases(
    source: Architecture, args: DistillConfig, calibration_tokens: int, device: torch.device | None = None
) -> list[Phase]:
    """Predict the memory to sort and measure the source.

    Args:
        source: its shape.
        args: of the chain.
        calibration_tokens: behind its statistics.
        device: None for that of `args`.
    """
    run = _run(args, device, source.config)
    return [_statistics("sort, statistics", source, run, calibration_tokens)]


def anchor_phases(
    upper: Architecture, step: Step, calibration_tokens: int, device: torch.device | None = None
) -> list[Phase]:
    """Predict the memory of a lower anchor.

    Args:
        upper: the anchor above it.
        step: the anchor.
        calibration_tokens: behind its statistics.
        device: None for that of the step's arguments.
    """
    lower = step.architecture
    run = replace(_run(step.args, device, upper.config), second=step.second_teacher)
    above, below = run.weights(upper.num_parameters), run.weights(lower.num_parameters)
    phases = []
    if step.matched is not None:
        moments, passing = _matching(upper, lower, run)
        # In float32; where the stream is rotated first, there is a second copy of the model.
        copies = 4 * lower.num_parameters * (1 if lower.tied else 2)
        # How much it counts is measured on a target in the middle, beside the cut that is mixed into it.
        mixed = 0 if upper.sizes == lower.sizes else 4 * (upper.num_parameters + lower.num_parameters)
        phases.append(run.phase("match", above + copies + max(moments, passing, moments + mixed), below + moments))
    else:
        if measured_blocks(upper, lower.depth):
            phases.append(run.phase("choose layers", above + _block_search(upper, lower.depth, run), above))
        phases.append(run.phase("refit", above + below + _refit(upper, lower, run, calibration_tokens), below))
    phases.append(run.phase("train", _training(lower, upper.config, upper.num_parameters, run), below))
    return [*phases, _statistics("statistics", lower, run, calibration_tokens)]


def bridge_phases(
    teacher: PretrainedConfig,
    parameters: int,
    student: Architecture,
    args: BridgeDistillConfig,
    calibration_tokens: int,
    device: torch.device | None = None,
    teacher_dtype: torch.dtype = torch.float32,
) -> list[Phase]:
    """Predict the memory of anchor zero.

    Args:
        teacher: config of the source, of any architecture.
        parameters: of the source.
        student: anchor zero.
        args: of the bridge.
        calibration_tokens: behind its statistics.
        device: None for that of `args`.
        teacher_dtype: that the source is loaded in.
    """
    run = _run(args, device, student.config, teacher_dtype)
    host = run.weights(student.num_parameters) + parameters * teacher_dtype.itemsize
    return [
        run.phase("train", _training(student, teacher, parameters, run), host),
        _statistics("sort, statistics", student, run, calibration_tokens),
    ]


# Of the parameters' bytes: AdamW keeps two moments.
_STATES = {"adamw": 2.0, "lion": 1.0, "sgd": 0.0, "rmsprop": 1.0, "adagrad": 1.0}


def optimizer_bytes(student: Architecture, args: DistillConfig, dtype: torch.dtype) -> int:
    """Count what an optimizer keeps between steps.

    Args:
        student: the trained model.
        args: their `optim`; one that is not known counts as AdamW.
        dtype: of the weights.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if "adafactor" in name:
        # A row and a column of each matrix (Shazeer and Stern 2018, arXiv 1804.04235, section 3).
        return sum(4 * sum(shape) for shape in student.state_shapes.values())
    copies = next((copies for kind, copies in _STATES.items() if kind in name), 2.0)
    size = 1 if "8bit" in name else dtype.itemsize
    return int(copies * student.num_parameters * size)


def _training(student: Architecture, teacher: PretrainedConfig, teacher_parameters: int, run: _Run) -> int:
    """Bytes of the most demanding moment of a training: a step with the largest hybrid, or the optimizer's."""
    trained, moments = run.weights(student.num_parameters), optimizer_bytes(student, run.args, run.dtype)
    step = max(_step_peaks(student, teacher, run).values())
    # Not fused, it takes the square root of all second moments at once on a GPU.
    roots = trained if str(getattr(run.args.optim, "value", run.args.optim)) == "adamw_torch" and not run.on_cpu else 0
    projectors = _projectors(student, teacher, run.args)
    taught = 0 if getattr(run.args, "black_box", False) else teacher_parameters * run.teacher_dtype.itemsize
    if run.second is not None:
        taught += run.second.num_parameters * run.teacher_dtype.itemsize
    return taught + trained + moments + 3 * projectors + max(trained + projectors + roots, step)


def _depth(config: PretrainedConfig) -> int:
    return int(config.get_text_config().num_hidden_layers)


def _shallow(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    """The config of a model with the first layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    return config


def _step_peaks(student: Architecture, teacher: PretrainedConfig, run: _Run) -> dict[str, int]:
    """The most bytes alive in each part of a step, above the weights and the optimizer's states.

    Measured with a few layers, and with one more of each kind: one that stands for itself, a block of two that a
    hybrid swaps, one more layer in such a block.
    """
    depth, above = student.depth, _depth(teacher)
    bridged = isinstance(run.args, BridgeDistillConfig)
    upper = None if bridged else describe(teacher)
    if upper is not None and run.args.swap_probability and upper.sizes != student.sizes:
        return _width_peaks(student, upper, run)
    if bridged or depth >= above:
        base, other = (
            _trace(student.with_layers(range(n)), _shallow(teacher, n), [[i] for i in range(n)], run) for n in (2, 3)
        )
        return _further(base, [(depth - 2, base, other)])
    sizes = [len(block.layers) for block in spaced_blocks(above, depth)]
    single = sizes.count(1)
    counts = {(1, 0, 0): single - 2, (0, 1, 0): depth - single - 1, (0, 0, 1): above - single - 2 * (depth - single)}
    base, steps = _with_blocks(student, teacher, (2, 1, 0), run), []
    for change, count in counts.items():
        if count:
            steps.append((count, base, _with_blocks(student, teacher, (2 + change[0], 1 + change[1], change[2]), run)))
    return _further(base, steps)


def _further(
    base: Mapping[str, int], steps: Sequence[tuple[int, Mapping[str, int], Mapping[str, int]]]
) -> dict[str, int]:
    """Add to what was measured so many times the difference of two measurements, for each of the steps."""
    return {
        event: peak + sum(count * (more[event] - less[event]) for count, less, more in steps)
        for event, peak in base.items()
    }


def _width_peaks(student: Architecture, upper: Architecture, run: _Run) -> dict[str, int]:
    """The same with hybrids in width, the largest of which is taken on every step."""
    blocks = [list(block.layers) for block in spaced_blocks(upper.depth, student.depth)]
    target = max(targets_between(upper, student, blocks), key=lambda shape: shape.num_parameters)

    def trace(block_map: list[list[int]], depth: int) -> dict[str, int]:
        above = upper.with_layers(range(block_map[-1][-1] + 1))
        shape = above.resized(**target.sizes).with_layers(range(depth))
        below = above.with_layers([block[-1] for block in block_map]).resized(**student.sizes)
        return _trace(below, above.config, block_map, run, shape)

    if upper.depth == student.depth:
        base, other = trace([[0], [1]], 2), trace([[0], [1], [2]], 3)
        peaks = _further(base, [(student.depth - 2, base, other)])
    else:
        base, swapped, longer = trace([[0], [1, 2]], 2), trace([[0], [1, 2]], 3), trace([[0], [1], [2, 3]], 3)
        both = student.depth - 2
        peaks = _further(base, [(target.depth - 2 - both, base, swapped), (both, base, longer)])
    fits = _fits(upper, target)
    # Where products are in half precision, they were traced in it.
    placed = 3 * fits if run.on_cpu else fits if (run.half or run.dtype) == torch.float32 else 0
    return {event: peak + placed for event, peak in peaks.items()}


def _fits(upper: Architecture, target: Architecture) -> int:
    """Bytes of the least-squares fits of a target in float32: what is cut from what is kept, at every site."""
    wide = upper.with_layers(range(target.depth))
    lengths = [
        [axis_length(site.axis, sizes) for sizes in (upper.sizes, target.sizes)]
        for site, _ in cut_fits(wide, wide.resized(**target.sizes))
    ]
    return sum(4 * (full - kept) * kept for full, kept in lengths)


@dataclass(frozen=True)
class _NoMoments:
    """Statistics without data; see `SiteStatistics`."""

    architecture: Architecture
    ridge: float = RIDGE

    def _length(self, site: str) -> int:
        places: list[Any] = [*self.architecture.measured_sites, *self.architecture.output_norms]
        axis = next(place.axis for place in places if place.name == site)
        return axis_length(axis, self.architecture.sizes)

    def mean(self, site: str) -> Tensor:
        return torch.empty(self._length(site))

    def variances(self, site: str) -> Tensor:
        return torch.empty(self._length(site), dtype=torch.float64)

    def prefix_squares(self, site: str) -> Tensor:
        return torch.empty(self._length(site), dtype=torch.float64)

    def second(self, site: str) -> Tensor:
        return torch.empty(self._length(site), self._length(site), dtype=torch.float64)

    def factor(self, site: str, kept: Tensor) -> Tensor:
        return torch.empty(self._length(site), len(kept), dtype=torch.float64)


def _width_hybrid(ours: Any, theirs: Any, block_map: list[list[int]], shape: Architecture) -> WidthHybrid:
    above, below = describe(theirs.config), describe(ours.config)
    weights = weights_of_teacher(theirs, above, stored={})
    kept = [block[-1] for block in block_map]
    pair = Pair(weights, above, {}, below, _NoMoments(above), block_map, kept)
    return WidthHybrid(pair, 1.0, 0, [shape])


def _with_blocks(
    student: Architecture, teacher: PretrainedConfig, kinds: tuple[int, int, int], run: _Run
) -> dict[str, int]:
    """Trace a pair with blocks of one layer, of two, and so many layers more in one of these."""
    singles, doubles, more = kinds
    sizes = [1] * (singles - 1) + [2 + more] + [2] * (doubles - 1) + [1]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    block_map = [[*range(start, start + size)] for start, size in zip(starts, sizes, strict=True)]
    return _trace(student.with_layers(range(len(sizes))), _shallow(teacher, sum(sizes)), block_map, run)


class _Timeline:
    """The most bytes alive before each of a series of events, beside those at the start."""

    def __init__(self, count: Bytes) -> None:
        self._count, self._start = count, count.now
        self.peaks: dict[str, int] = {}
        count.reset()

    def mark(self, event: str) -> None:
        peak = self._count.peak - self._start
        self.peaks[event] = max(self.peaks.get(event, 0), peak)
        self._count.reset()

    @contextmanager
    def passing(self, layers: Any, name: str) -> Iterator[None]:
        """Within it mark, too, where the backward pass of what is run will leave the uppermost and lowest layer."""

        def hook(event: str) -> Callable[..., None]:
            def enter(module: Any, args: tuple[Any, ...], kwargs: Any) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                hidden.register_hook(lambda slope: self.mark(f"{name} {event}"))

            return enter

        places = {len(layers) - 1: "top", 0: "bottom"}
        handles = [layers[i].register_forward_pre_hook(hook(place), with_kwargs=True) for i, place in places.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _trace(
    student: Architecture,
    teacher: PretrainedConfig,
    block_map: list[list[int]],
    run: _Run,
    between: Architecture | None = None,
) -> dict[str, int]:
    """Run the passes of a micro-batch as `DistillTrainer` does, forward and backward, where every token is scored.

    Args:
        student, teacher: a few layers of the two.
        block_map: for each layer of the student the teacher's it stands for.
        run: how.
        between: shape of a hybrid in width.
    """
    args, bridged = _with_hybrid(run.args), isinstance(run.args, BridgeDistillConfig)
    with traced(run.device, run.half) as count:
        theirs = run.model(teacher, run.teacher_dtype).eval().requires_grad_(False)
        teaches = _teachers(run, theirs)
        ours = _trained(run, student.config)
        hybrid_in_width = None if between is None else _width_hybrid(ours, theirs, block_map, between)
        pairs = LayerPairs(ours, theirs, block_map, None, args, hybrid_in_width)
        line, batch = _Timeline(count), _batch(args, learned_positions(ours))
        if args.gradient_accumulation_steps > 1:
            for parameter in ours.parameters():
                parameter.grad = torch.empty_like(parameter)
        mixed = nullcontext() if run.half is None else torch.autocast("cpu", run.half)
        with torch.no_grad(), mixed, pairs.teacher_outputs.recording(batch.labels_BT.device) as teacher_states:
            predicted = teaches.predict(batch, ours)
        line.mark("teacher")
        rows = ours.config.get_text_config().vocab_size
        widest = max(rows, theirs.config.get_text_config().vocab_size) if bridged else rows
        chunk = args.loss_chunk_size or default_chunk(widest, run.device)
        weights = _weights(args)

        def forward(through: Pass) -> Tensor:
            with pairs.student_outputs.recording(batch.labels_BT.device) as states, mixed:
                inside = (_BridgedLoss if bridged else StepLoss)(
                    student=through.model,
                    labels_BT=batch.labels_BT,
                    scored=batch.scored,
                    teacher_scored=batch.scored,
                    teacher=predicted,
                    objective=_objective(args, rows),
                    weights=weights,
                    pairs=pairs,
                    student_states=states,
                    teacher_states=teacher_states,
                    chunk=chunk,
                )
                return through.run(**batch.inputs, inside=inside)["total"]

        itself, beside = Pass(ours, ours), None
        if pairs.hybrid is not None:
            with pairs.hybrid.at(0, itself) as hybrid:
                assert hybrid is not None
                with line.passing(decoder_layers(hybrid.model), "hybrid"):
                    beside = forward(hybrid)
            line.mark("hybrid loss")
        with line.passing(decoder_layers(ours), "student"):
            loss = forward(itself)
        line.mark("student loss")
        (loss if beside is None else loss + beside).backward()
        line.mark("backward")
        return line.peaks


def _teachers(run: _Run, first: Any) -> Any:
    """The teacher of a run, alone or with the one beside it."""
    if run.second is None:
        return LocalTeacher(first)
    # A pass without gradients takes what its largest layer does.
    second = run.model(_shallow(run.second.config, 1), run.teacher_dtype).eval().requires_grad_(False)
    return EnsembleTeacher([LocalTeacher(first), LocalTeacher(second)], run.args.teacher_weights or [])


def _trained(run: _Run, config: PretrainedConfig) -> Any:
    """A student without data, checkpointed if it is to be."""
    model = run.model(config).train()
    if run.args.gradient_checkpointing:
        with warnings.catch_warnings():
            # Its name changes from one version to the next.
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    return model


def _with_hybrid(args: DistillConfig) -> DistillConfig:
    """The arguments with a hybrid on every step, if there are any, and a bridge's hidden-state term, if it is open."""
    args = copy.copy(args)
    if args.swap_probability:
        args.swap_probability = 1.0
    if isinstance(args, BridgeDistillConfig) and args.hidden_weight is None and not args.black_box:
        args.hidden_weight, args.hidden_projector = HIDDEN_WEIGHT, True
    return args


def _weights(args: DistillConfig) -> TermWeights:
    """The highest weights of the run: a term that is on at some step is counted."""
    highest = {term: schedule.highest for term, schedule in args.schedules().items()}
    return TermWeights(**highest)


def _batch(args: DistillConfig, positions: int | None) -> Batch:
    rows, length = args.per_device_train_batch_size, args.max_length or min(1024, positions or 1024)
    ids = torch.empty(rows, length, dtype=torch.long)
    scored = Scored(torch.empty(rows * (length - 1), dtype=torch.long))
    collated = {"input_ids": ids, "labels": ids, "scored": scored}
    if not args.packing:
        # Of rows of different lengths: transformers leaves out a mask that is plainly causal.
        collated["attention_mask"] = torch.empty(rows, 1, length, length, dtype=torch.bool)
    return Batch.split(collated)


class _BridgedLoss(StepLoss):
    """The loss of a bridge, as far as its memory goes: "alm" reads how probable the text is to both models, other
    objectives read the distributions."""

    def _terms(self, hidden_BTd: Tensor, head: Any) -> tuple[Tensor, dict[str, Tensor]]:
        hidden_Nd, targets_N = self._scored(hidden_BTd)
        teacher, objective = self.teacher, self.objective
        if isinstance(objective, _OfTheText):
            with torch.no_grad():
                chunked_cross_entropy(teacher.hidden_ND, teacher.head, targets_N, self.chunk)
            teacher = objective
        return fused_terms(hidden_Nd, head, targets_N, teacher, objective, self.weights, self.chunk)


class _OfTheText:
    """An objective, and a teacher's output, of the text's own probabilities."""

    def at(self, part: slice) -> "_OfTheText":
        return self

    def rows(self, rows: slice) -> "_OfTheText":
        return self

    def terms(self, student_NV: Tensor, teacher: Any, targets_N: Tensor, weights: TermWeights) -> dict[str, Tensor]:
        def compare(log_prob_N: Tensor) -> Tensor:
            return -log_prob_N

        return compared_terms(student_NV, targets_N, torch.zeros_like(targets_N).float(), weights, compare)


def _objective(args: DistillConfig, rows: int) -> Any:
    if not isinstance(args, BridgeDistillConfig):
        return make_objective(args, rows)
    if args.black_box or list(args.objectives) == ["alm"]:
        return _OfTheText()
    return DistillObjective(get_divergence("forward_kl"))


def _projectors(student: Architecture, teacher: PretrainedConfig, args: DistillConfig) -> int:
    """Bytes of the learned maps between the widths of compared layers."""
    if not _with_hybrid(args).hidden_projector:
        return 0
    return 4 * student.depth * student.sizes["width"] * int(teacher.get_text_config().hidden_size)


# Layers of the models that the other phases are counted on.
_FEW = 2


def _per_layer(depth: int, measure: Callable[[int], int]) -> int:
    """What a model of a depth takes, from two shallow ones."""
    if depth <= _FEW + 1:
        return measure(depth)
    few, more = measure(_FEW), measure(_FEW + 1)
    return few + (depth - _FEW) * (more - few)


def _block_search(upper: Architecture, depth: int, run: _Run) -> int:
    """Bytes of `BlockSearch`: the streams before every layer, the last hidden states of every candidate, and
    logits in float32: those of a sample of 64 positions, of a chunk by two models, and on a GPU their logarithms and
    the divergence beside them."""
    length, rows = calibration_length(upper.config), upper.sizes["vocab"]
    tokens = length * (1 + max(1, -(-FIT_TOKENS // length)))
    stream = run.weights(upper.sizes["width"])
    kept = stream * (tokens * (upper.depth + 1) + 2 * length * len(measured_blocks(upper, depth)))
    chunk = min(length, default_chunk(rows, run.device))
    return kept + 4 * rows * (64 + (2 if run.on_cpu else 4) * chunk)


def _matching(upper: Architecture, lower: Architecture, run: _Run) -> tuple[int, int]:
    """Bytes of `find_placement`: those of the products of what both models read, at every site, with the upper
    streams of a batch; and those to pair their layers, at most."""
    pairs = paired_sites(upper, lower, spaced_layers(upper.depth, lower.depth))
    lengths = [(axis_length(one.axis, upper.sizes), axis_length(other.axis, lower.sizes)) for one, other in pairs]
    tokens = CALIBRATION_BATCH * calibration_length(upper.config)
    moments = 4 * (sum(above * below for above, below in lengths) + tokens * sum(above for above, _ in lengths))
    if upper.depth == lower.depth:
        return moments, 0
    states = upper.depth * upper.sizes["width"] + lower.depth * lower.sizes["width"]
    # The Gram matrices of the upper layers, before and after they are stacked, and states, what is written, and both
    # in one length.
    return moments, 4 * (2 * upper.depth * PAIRING_TOKENS**2 + 3 * PAIRING_TOKENS * states)


def _refit(upper: Architecture, lower: Architecture, run: _Run, calibration_tokens: int) -> int:
    """Bytes of `refit_layers`."""
    length = calibration_length(upper.config)

    def measure(layers: int) -> int:
        few = lower.with_layers(range(layers))
        with traced(run.device) as count:
            ours = run.model(few.config).eval()
            theirs = run.model(_shallow(upper.config, layers)).eval()
            start = count.now
            count.reset()
            tokens = torch.empty(max(1, calibration_tokens // length), length, dtype=torch.long)
            batches = [{"input_ids": batch} for batch in tokens.split(CALIBRATION_BATCH)]
            refit_layers(ours, theirs, few, [[i] for i in range(layers)], batches)
            return count.peak - start

    return _per_layer(lower.depth, measure)


def _statistics(name: str, architecture: Architecture, run: _Run, calibration_tokens: int) -> Phase:
    """What the statistics take where they are collected a site at a time; where there is more room, they take more."""
    length = calibration_length(architecture.config)
    largest = 4 * max(axis_length(site.axis, architecture.sizes) for site in architecture.measured_sites) ** 2
    few = architecture.with_layers(range(min(2, architecture.depth)))
    with traced(run.device) as count:
        model = run.model(few.config).eval()
        start = count.now
        count.reset()
        tokens = torch.empty(min(CALIBRATION_BATCH, max(1, calibration_tokens // length)), length, dtype=torch.long)
        collect_statistics(model, few, [{"input_ids": tokens}], seconds={})
        passing = count.peak - start
    weights = run.weights(architecture.num_parameters)
    return run.phase(name, weights + max(passing + largest, int((1 + FACTORIZING) * largest)), weights)
