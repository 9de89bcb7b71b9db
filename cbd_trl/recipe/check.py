"""Check a whole recipe before any work: everything that is wrong with it, and what it will take."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from transformers import PretrainedConfig

from cbd_trl.architectures import Architecture
from cbd_trl.architectures.registry import describe_shape
from cbd_trl.build.bridge_step import BridgeStep, plan_bridged_anchor
from cbd_trl.build.plan import Given, Step, plan_search, plan_step
from cbd_trl.build.resume import chosen_shapes, finished_anchors, pinned_commits
from cbd_trl.build.source_anchor import SourceAnchor, plan_source_anchor
from cbd_trl.build.special_tokens import SpecialTokens
from cbd_trl.chain.manifest import MANIFEST
from cbd_trl.chain.source import Source
from cbd_trl.recipe.configs import anchor_args, bridge_args, chain_args, default_args, refused_argument
from cbd_trl.recipe.data import check_data, check_mix, placed, shares_rows
from cbd_trl.recipe.estimate import (
    GPUS,
    LIBRARIES,
    Cost,
    Speed,
    anchor_cost,
    bridge_cost,
    disk_needed,
    machine_memory,
    measure_speed,
    measuring_seconds,
    smallest_gpu,
    source_cost,
)
from cbd_trl.recipe.memory import weight_dtype
from cbd_trl.recipe.schema import Recipe
from cbd_trl.report.sweep import RANDOM, REPORTED
from cbd_trl.shapes.budget import FlopCount
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.shapes.spread import spread_anchors
from cbd_trl.targets.many import multiplied_weights
from cbd_trl.trainers.bridge_config import BridgeDistillConfig
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.utils.files import write_text
from cbd_trl.utils.formatting import (
    anchor_name,
    did_you_mean,
    format_bytes,
    format_count,
    format_seconds,
    with_active,
)
from cbd_trl.utils.modeling import check_checkpoint
from cbd_trl.utils.progress import Progress

FILE = "recipe.json"


def remember(recipe: Recipe) -> None:
    """Write the recipe into the chain's folder.

    Args:
        recipe: about to be built.
    """
    folder = Path(recipe.output_dir)
    kept = recipe.model_dump(exclude={"problems", "lines", "output_dir"}, exclude_none=True)
    text = json.dumps({**kept, "compared": _compared(recipe)}, indent=1, default=str) + "\n"
    if not (folder / FILE).exists() or (folder / FILE).read_text(encoding="utf-8") != text:
        write_text(folder / FILE, text)


def check_unchanged(recipe: Recipe) -> None:
    """Check that source and text are those that the chain in the folder was begun with.

    `build_chain` compares shapes and arguments by itself.

    Args:
        recipe: about to be built.

    Raises:
        ValueError: naming what changed.
    """
    folder = Path(recipe.output_dir)
    if not (folder / FILE).exists():
        return
    try:
        there = json.loads((folder / FILE).read_text(encoding="utf-8"))["compared"]
        pairs = [(key, there[key], value) for key, value in _compared(recipe).items() if key in there]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / FILE} cannot be read ({error}), which records what the chain was begun with. If the recipe is "
            "still the same, delete that file."
        ) from error
    for key, was, now in pairs:
        if was != now:
            raise ValueError(
                f"{folder} was begun with another {key}: {was}, and {now} is requested now. Choose another "
                f"output_dir, or delete that folder to build anew{_nothing_finished(folder)}."
            )


def _nothing_finished(folder: Path) -> str:
    return "" if (folder / MANIFEST).exists() else " (no anchor in it is finished)"


def _compared(recipe: Recipe) -> dict[str, Any]:
    """By what an error calls it; an anchor that is added at the end of a recipe changes nothing above it."""
    texts = {"data": recipe.data}
    if recipe.bridge is not None:
        texts["bridge.data"] = recipe.bridge.data or recipe.data
    for number, anchor in enumerate(recipe.anchors):
        texts[f"anchors[{number}].data"] = anchor.data or recipe.data
    return {
        "source": None if recipe.source is None else recipe.source.model_dump(),
        "calibration_tokens": recipe.calibration_tokens,
        **{key: [part.model_dump() for part in parts] for key, parts in texts.items()},
    }


@dataclass
class Check:
    """The result of `check_recipe`.

    Args:
        recipe: the recipe.
        problems: what is wrong, each with its place; empty for a recipe that can be built.
        args: of the chain; None where they are wrong.
        bridge: of its bridge, likewise.
        steps: the lower anchors, those left out that cannot be.
        costs: of all anchors, largest first.
        finished: how many of them an earlier run finished.
        speed: of this machine.
        tokenizer: of the anchors; None where it is not known.
        disk_free: bytes.
    """

    recipe: Recipe
    problems: list[str] = field(default_factory=list)
    args: DistillConfig | None = None
    bridge: BridgeDistillConfig | None = None
    steps: list[Step] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    finished: int = 0
    speed: Speed | None = None
    tokenizer: Any = None
    disk_free: int = 0

    @property
    def disk_needed(self) -> int:
        """Bytes still to be written at most at any time, beside the anchors that are finished."""
        return disk_needed(self.costs[self.finished :])

    def model_weights(self) -> list[float]:
        """List what each anchor and target is multiplied with for a token; a target counts as the mean anchor."""
        anchors = [float(multiplied_weights(cost.architecture)) for cost in self.costs]
        sizes = self.recipe.evaluation.sizes if self.recipe.evaluation else ()
        return [*anchors, *[sum(anchors) / len(anchors)] * len(sizes)] if anchors else []

    @property
    def measuring(self) -> float | None:
        """Seconds to measure the finished chain; None where there is no evaluation."""
        evaluation = self.recipe.evaluation
        if evaluation is None or self.speed is None:
            return None
        weights = self.model_weights()
        weights += weights[len(self.costs) :] * (len(evaluation.operators) - 1)
        return measuring_seconds(weights, evaluation.tokens, self.speed)

    def attempt(self, place: str, work: Callable[[], Any]) -> Any:
        """Call `work`; where it raises, add a problem of that place and return None."""
        try:
            return work()
        except Exception as error:  # what a library raises on a value that it did not expect may be anything
            text = " ".join(str(error).split())
            # Of these the text alone says what is wrong; of a KeyError, for one, it is a key.
            if not text or not isinstance(error, ValueError | TypeError | OSError | ImportError):
                text = f"{type(error).__name__}: {text}".rstrip(": ")
            self.problems.append(text if place and text.startswith(place) else f"{place}: {text}")
            return None

    def make_config(self, place: str, make: Callable[[Mapping[str, Any]], Any], args: Mapping[str, Any]) -> Any:
        """Make a config; None where it cannot be made, which is then a problem of the argument to blame.

        Args:
            place: of the arguments.
            make: the config of them.
            args: as the recipe has them.
        """
        try:
            return make(args)
        except Exception:  # as in `attempt`, which reports it
            name = refused_argument(make, args)
            return self.attempt(f"{place}.{name}" if name else place, lambda: make(args))


def check_recipe(recipe: Recipe) -> Check:
    """Check everything that a build needs, and build nothing: no weights are read.

    Args:
        recipe: from `read_recipe`.

    Returns:
        all that is wrong with it, and what it will take.
    """
    check = Check(recipe, list(recipe.problems))
    check.attempt("output_dir", lambda: _check_folder(Path(recipe.output_dir)))
    check.args = check.make_config("args", partial(chain_args, recipe), recipe.args)
    if recipe.bridge is not None:
        check.bridge = check.make_config("bridge.args", partial(bridge_args, recipe), recipe.bridge.args)
    source = None if recipe.source is None else _source_anchor(check, check.args or default_args(recipe))
    check.tokenizer = None if source is None else source.tokenizer
    _check_data(check)
    _check_operators(check)
    if source is not None:
        commits = check.attempt("output_dir", lambda: pinned_commits(Path(recipe.output_dir))) or {}
        given = Given(source.tokenizer, None, list(source.sources), commits)
        plan_costs(check, source.architecture, given, check.attempt("source", lambda: _bridged_config(check)))
        _check_lengths(check, source.architecture)
        _check_sizes(check, source.architecture)
        if not check.problems:
            done = check.attempt("output_dir", lambda: finished_anchors(Path(recipe.output_dir), source, check.steps))
            check.finished = len(done or {})
            check.attempt("output_dir", lambda: check_unchanged(recipe))
        _check_disk(check)
    return check


def plan_costs(
    check: Check, source: Architecture, given: Given | None, teacher: PretrainedConfig | None = None
) -> None:
    """Resolve the anchors of a recipe from the largest down, and estimate what each takes.

    Args:
        check: `steps`, `costs`, `speed` and `problems` are filled.
        source: the largest anchor.
        given: what is needed to look at models that are anchors; None where there are none.
        teacher: config of the source, where there is a bridge.
    """
    recipe, args = check.recipe, check.args or default_args(check.recipe)
    targets = [anchor.target for anchor in recipe.anchors]
    searched = (recipe.shape_search, recipe.shape_trainings, recipe.shape_training_steps)
    search = check.attempt(
        "shape_search", lambda: plan_search(targets, *searched, chosen_shapes(Path(recipe.output_dir)))
    )
    speed = check.speed = measure_speed(args, source.sizes["width"])
    names, upper = [anchor_name(source.num_parameters)], source
    if check.bridge is not None and teacher is not None:
        costs = (teacher, source, check.bridge, recipe.calibration_tokens, speed, weight_dtype(args, teacher))
        check.costs.append(bridge_cost(names[0], *costs))
    else:
        check.costs.append(source_cost(names[0], source, args, recipe.calibration_tokens, speed))
    for position, anchor in enumerate(recipe.anchors):
        place = f"anchors[{position}]"
        # Where the arguments of all are wrong, the shapes are still looked at.
        own = args
        if check.args is not None:
            own = check.make_config(f"{place}.args", partial(anchor_args, recipe), anchor.args)
        if own is None:
            continue
        if anchor.model is not None:
            check.attempt(f"{place}.model", partial(_check_weights, anchor.model))
            _check_revision(check, place, anchor.model, anchor.revision)
        planned = partial(plan_step, upper, anchor.target, position, own, None, names, given, search)
        step = check.attempt(place, planned)
        if step is None:
            continue
        check.steps.append(step)
        check.costs.append(anchor_cost(upper, step, recipe.calibration_tokens, speed))
        names, upper = [*names, step.name], step.architecture


def _source_anchor(check: Check, args: DistillConfig) -> SourceAnchor | None:
    """The largest anchor as `build_chain` would make it; where it is, its config and its tokenizer are right."""
    recipe = check.recipe
    assert recipe.source is not None
    origin = Source(recipe.source.name, recipe.source.revision)
    check.attempt("source", lambda: _check_weights(recipe.source.name))  # type: ignore[union-attr]
    _check_revision(check, "source", recipe.source.name, recipe.source.revision)
    own = [anchor.args for anchor in recipe.anchors] + ([recipe.bridge.args] if recipe.bridge else [])
    special = check.attempt("args", lambda: SpecialTokens.of([recipe.args, *own])) or SpecialTokens()
    if recipe.bridge is None:
        return check.attempt("source", lambda: plan_source_anchor(origin, None, args, None, special))
    check.attempt("bridge.model", lambda: _check_weights(recipe.bridge.model))  # type: ignore[union-attr]
    if check.bridge is None:
        return None
    step = BridgeStep(recipe.bridge.model, args=check.bridge)
    places = (None, None, Path(recipe.output_dir))
    return check.attempt("bridge", lambda: plan_bridged_anchor(step, origin, None, args, *places, special))


def _check_weights(name: str) -> None:
    """Check that a model folder has its weights; of a model on the Hub loading does."""
    if (Path(name) / "config.json").exists():
        check_checkpoint(name, role="model")


def _check_revision(check: Check, place: str, name: str, revision: str | None) -> None:
    if revision is not None and Path(name).is_dir():
        check.problems.append(
            f"{place}.revision: {name} is a folder, which has no revision {revision!r}. Leave it out, or name a model "
            "on the Hub."
        )


def _check_data(check: Check) -> None:
    recipe = check.recipe
    trained = [
        ("data", recipe.data),
        *((f"anchors[{n}].data", anchor.data) for n, anchor in enumerate(recipe.anchors)),
    ]
    trained += [("bridge.data", recipe.bridge.data)] if recipe.bridge else []
    held_out = recipe.evaluation.data if recipe.evaluation else ()
    for place, parts in [*trained, ("evaluation.data", held_out)]:
        columns = [
            check.attempt(where, partial(check_data, part, check.tokenizer, check.args))
            for where, part in placed(parts, place)
        ]
        if None not in columns:
            check.attempt(place, partial(check_mix, parts, columns))
    for where, part in placed(held_out, "evaluation.data"):
        every = (pair for place, others in trained for pair in placed(others, place))
        if both := next(((place, known) for place, known in every if shares_rows(part, known)), None):
            check.problems.append(
                f"{where}: {part.name} ({part.split}) is trained on, too ({both[0]}: {both[1].split}), so its "
                "loss would not be that on new text. Name another file or split, or slices that share no row: "
                "train[:95%] and train[95%:]."
            )


def _check_operators(check: Check) -> None:
    operators = check.recipe.evaluation.operators if check.recipe.evaluation else (REPORTED[0],)
    known = (*REPORTED, RANDOM)
    for number, name in enumerate(operators):
        if name not in known:
            check.problems.append(
                f"evaluation.operators[{number}]: there is no {name!r} to measure.{did_you_mean(name, known)} There "
                f"are: {', '.join(known)}."
            )
    if set(operators) == {RANDOM}:
        check.problems.append(f"evaluation.operators: {RANDOM} needs an operator beside it, such as {REPORTED[0]}.")


def _check_lengths(check: Check, source: Architecture) -> None:
    """Check that rows and blocks are within the positions of the models."""
    positions, evaluation = int(source.config.max_position_embeddings), check.recipe.evaluation
    lengths = [
        (f"anchors[{n}].args.max_length", step.args.max_length) for n, step in enumerate(check.steps) if check.args
    ]
    lengths = list({length: (place, length) for place, length in reversed(lengths)}.values())
    lengths += [("bridge.args.max_length", check.bridge.max_length)] if check.bridge else []
    lengths += [("evaluation.length", evaluation.length)] if evaluation else []
    # In place of a length that was refused there is the default, which nobody requested.
    refused = {problem.partition(":")[0] for problem in check.recipe.problems}
    for place, length in lengths:
        if place in refused or (place.endswith("args.max_length") and "args.max_length" in refused):
            continue
        if length is not None and length > positions:
            check.problems.append(f"{place}: {length} tokens are more than the {positions} that the models can read.")


def _check_sizes(check: Check, source: Architecture) -> None:
    """Check that targets to measure are between the anchors; of a shape, that its fields are known."""
    evaluation = check.recipe.evaluation
    if evaluation is None or len(check.costs) <= len(check.recipe.anchors):
        return
    largest, smallest = (check.costs[end].architecture.num_parameters for end in (0, -1))
    for number, size in enumerate(evaluation.sizes):
        place = f"evaluation.sizes[{number}]"
        if isinstance(size, Mapping):
            for name in (name for name in size if not hasattr(source.config, name)):
                known = did_you_mean(name, source.shape)
                check.problems.append(f"{place}.{name}: the config of the source has no such field.{known}")
        elif not smallest <= size <= largest:
            check.problems.append(
                f"{place}: {size:,.0f} parameters are not between the smallest anchor ({smallest:,}) and the largest "
                f"({largest:,}), where all targets lie."
            )


def _bridged_config(check: Check) -> PretrainedConfig | None:
    """Of a source that a bridge begins with, of any architecture."""
    recipe = check.recipe
    if recipe.bridge is None or recipe.source is None:
        return None
    return Source(recipe.source.name, recipe.source.revision).config()


def _check_folder(folder: Path) -> None:
    there = _nearest(folder)
    if not there.is_dir():
        raise ValueError(
            f"{there} is a file, so the chain cannot be written to {folder}. Name a folder, or one that is yet to be."
        )


def _nearest(folder: Path) -> Path:
    """The folder, or what there is of the way to it."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _check_disk(check: Check) -> None:
    folder = _nearest(Path(check.recipe.output_dir))
    check.disk_free = shutil.disk_usage(folder).free
    if check.disk_needed > check.disk_free:
        check.problems.append(
            f"output_dir: the chain needs {format_bytes(check.disk_needed)} there with the checkpoints of one anchor "
            f"(weights, statistics, optimizer), and {format_bytes(check.disk_free)} are free. Make room, choose "
            "another disk, set args.save_total_limit to 1, or args.save_strategy to 'no' and go without resuming."
        )


def recipe_table(check: Check) -> Table:
    """Make a table with a line for each anchor, one for the evaluation and one for all.

    Args:
        check: of a recipe.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"What {check.recipe.name} would build")
    for name in ("anchor", "parameters", "shape", "disk", "checkpoints", "tokens", "time"):
        table.add_column(name, justify="left" if name in ("anchor", "shape") else "right")
    for number, cost in enumerate(check.costs):
        table.add_row(*_cells(cost, finished=number < check.finished))
    left = check.costs[check.finished :]
    seconds = [cost.seconds for cost in left] + [check.measuring or 0.0]
    if check.measuring is not None:
        table.add_row("evaluation", *[""] * 5, _time(check.measuring))
    table.add_section()
    table.add_row(
        "all" if not check.finished else "left",
        "",
        "",
        format_bytes(sum(cost.disk for cost in left)),
        format_bytes(max((cost.checkpoints for cost in left), default=0)),
        _count([cost.tokens for cost in left]),
        _time(None if None in seconds else sum(second or 0 for second in seconds)),
    )
    return table


def shapes_table(check: Check) -> Table | None:
    """Make a table of the shapes that are compared for anchors given by a size; None where none are.

    Below an anchor whose shape is yet to be found they are those for the first of its shapes.

    Args:
        check: of a recipe without problems.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Shapes to compare, the one without a search first")
    for name in ("anchor", "shape", "parameters", "FLOPs a token"):
        table.add_column(name, justify="left" if name in ("anchor", "shape") else "right")
    for number, step in enumerate(check.steps):
        if step.search is None or number + 1 < check.finished:
            continue
        upper = check.costs[number].architecture
        for fields in spread_anchors(upper, step.search["size"], step.search["shapes"]):
            one = cut_architecture(upper, fields)
            counts = map(format_count, (one.num_parameters, FlopCount.of(one)))
            table.add_row(step.name, describe_shape(one.shape, short=True), *counts)
    return table if table.row_count else None


def memory_table(check: Check) -> Table:
    """Make a table with a line for each phase of each anchor, the largest of them marked.

    Args:
        check: of a recipe.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Memory of each phase, at most")
    left = check.costs[check.finished :]
    for cost in Progress("Counting memory", left):
        cost.phases  # noqa: B018 - kept from now on
    on_cpu = all(cost.args.device.type == "cpu" for cost in left)
    columns = ("anchor", "phase", "memory") if on_cpu else ("anchor", "phase", "on the device", "in the machine")
    for name in columns:
        table.add_column(name, justify="left" if name in ("anchor", "phase") else "right")
    most = max((cost.memory for cost in left), default=0)
    for cost in left:
        for phase in cost.phases:
            peak = " (peak)" if phase is cost.peak and cost.memory == most else ""
            sizes = [LIBRARIES + phase.device] if on_cpu else [LIBRARIES + phase.device, LIBRARIES + phase.host]
            table.add_row(cost.name, phase.name + peak, *map(format_bytes, sizes))
    return table


def how_models_are_used(check: Check) -> str:
    """Explain what becomes of each model that exists already, a line each: an anchor, or a second teacher and why.

    Args:
        check: of a recipe.
    """
    return "\n".join(f"{step.name}: {step.public.summary}" for step in check.steps if step.public is not None)


def how_it_fits(check: Check) -> str:
    """Name the smallest common GPU that the chain fits on, and what would save memory where it does not fit here.

    Args:
        check: of a recipe.
    """
    left = check.costs[check.finished :]
    if not left:
        return ""
    for cost in Progress("Counting memory on a GPU", left):
        cost.gpu_memory  # noqa: B018 - kept from now on
    largest = max(left, key=lambda cost: cost.gpu_memory)
    gpu, needed = smallest_gpu(largest.gpu_memory), format_bytes(largest.gpu_memory)
    fits = "no common one (141 GB at most) alone holds" if gpu is None else f"one of {gpu} GB holds"
    lines = [
        "Memory: every tensor that PyTorch holds at the worst moment, counted, and 0.5 GB of libraries, on one "
        "device, with nothing sharded; without the work space of kernels. Statistics use more where more is free.",
        f"On a GPU: {needed} at most, for {largest.name}, which {fits}.",
    ]
    here, there = max(left, key=lambda cost: cost.memory), machine_memory(largest.args.device)
    if here.memory > there:
        lines.append(
            f"This machine's {here.args.device} has {format_bytes(there)}, and {here.name} takes "
            f"{format_bytes(here.memory)} on it."
        )
    if gpu != GPUS[0] or here.memory > there:
        saved = [f"{what} ({format_bytes(count)})" for what, count in largest.savings().items()]
        lines.append(f"Each of these alone in args would save memory there: {'; '.join(saved)}.")
    return "\n".join(lines)


def how_estimated(check: Check) -> str:
    """Explain where the numbers of the table come from, in a few sentences.

    Args:
        check: of a recipe.
    """
    lines = [
        "Disk: weights and statistics (0.15 of the weights in bfloat16); checkpoints are there while an anchor is "
        f"trained. Free: {format_bytes(check.disk_free)}.",
        "Tokens: those of full rows; shorter rows that are not packed have fewer.",
    ]
    if check.speed is not None:
        lines.append(_speed(check.speed))
    limits = [(cost.name, cost.architecture.engine_limit(chosen=False)) for cost in check.costs]
    lines += [f"{name}: {limit}" for name, limit in limits if limit]
    return "\n".join(lines)


def _speed(speed: Speed) -> str:
    products = speed.products / 1e9
    rate = f"{products:,.0f}" if products >= 10 else f"{products:.2g}"
    measured = f"a matrix product does {rate} GFLOP/s on {speed.device} now"
    share = f"a training is taken to reach {speed.training / speed.products:.2g} of that"
    known = (
        "a share that was measured (SmolLM2-135M, float32, two cores): within a factor of two or so"
        if speed.device == "cpu"
        else "a share that is assumed and not compared with any run on such a device"
    )
    return f"Time: {measured}; {share}, {known}."


def _cells(cost: Cost, finished: bool) -> list[str]:
    total, active = cost.architecture.num_parameters, cost.architecture.num_active_parameters
    cells = [cost.name, with_active(format_count(total), total, active), describe_shape(cost.architecture.shape)]
    if finished:
        return [*cells, *["finished", "", "", ""]]
    return [
        *cells,
        format_bytes(cost.disk),
        format_bytes(cost.checkpoints),
        _count([cost.tokens]),
        _time(cost.seconds),
    ]


def _count(tokens: list[int | None]) -> str:
    known = [count for count in tokens if count is not None]
    return format_count(sum(known)) if len(known) == len(tokens) else "by epochs"


def _time(seconds: float | None) -> str:
    return "not known" if seconds is None else f"about {format_seconds(seconds)}"
