"""A recipe, checked whole before any work: everything that is wrong with it, and what it will take."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from transformers import AutoModelForCausalLM

from cbd_trl.architectures import Architecture, describe
from cbd_trl.architectures.registry import describe_shape
from cbd_trl.build.bridge_step import BridgeStep, bridged_head
from cbd_trl.build.plan import Step, plan_step
from cbd_trl.build.resume import finished_anchors
from cbd_trl.build.source_anchor import Head, source_head
from cbd_trl.build.special_tokens import SpecialTokens
from cbd_trl.chain.manifest import MANIFEST
from cbd_trl.chain.source import Source
from cbd_trl.recipe.arguments import anchor_args, bridge_args, default_args
from cbd_trl.recipe.data import check_data, check_mix, shares_rows
from cbd_trl.recipe.estimate import Cost, Speed, anchor_cost, bridge_cost, disk_needed, head_cost, measure_speed
from cbd_trl.recipe.schema import DataPart, Recipe
from cbd_trl.trainers.bridge_config import BridgeDistillConfig
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.utils.files import write_text
from cbd_trl.utils.formatting import anchor_name, format_bytes, format_count, format_seconds
from cbd_trl.utils.modeling import check_checkpoint

FILE = "recipe.json"


def remember(recipe: Recipe) -> None:
    """Write what the recipe says into the chain's folder.

    Args:
        recipe: about to be built.
    """
    folder = Path(recipe.output_dir)
    said = {**asdict(recipe), "compared": _compared(recipe)}
    for key in ("problems", "lines", "output_dir"):
        said.pop(key)
    text = json.dumps(said, indent=1, default=str) + "\n"
    if not (folder / FILE).exists() or (folder / FILE).read_text(encoding="utf-8") != text:
        write_text(folder / FILE, text)


def check_unchanged(recipe: Recipe) -> None:
    """Refuse another source or other text than the chain in the folder was begun with.

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
            f"{folder / FILE} cannot be read ({error}), which says what the chain was begun with. If the recipe is "
            "still the same, delete that file."
        ) from error
    for key, was, now in pairs:
        if was != now:
            raise ValueError(
                f"{folder} was begun with another {key}: {was}, and {now} is asked for now. Choose another "
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
        "source": None if recipe.source is None else asdict(recipe.source),
        "calibration_tokens": recipe.calibration_tokens,
        **{key: [_told(part) for part in parts] for key, parts in texts.items()},
    }


def _told(part: DataPart) -> dict[str, Any]:
    return {key: value for key, value in asdict(part).items() if key != "where"}


@dataclass
class Check:
    """What is known of a recipe before any work.

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

    def attempt(self, place: str, work: Callable[[], Any]) -> Any:
        """What `work` returns; None where it raises, which is then a problem of that place."""
        try:
            return work()
        except Exception as error:  # what a library raises on a value that it did not expect may be anything
            text = " ".join(str(error).split())
            # Of these the text alone says what is wrong; of a KeyError, for one, it is a key.
            if not text or not isinstance(error, ValueError | TypeError | OSError | ImportError):
                text = f"{type(error).__name__}: {text}".rstrip(": ")
            self.problems.append(text if place and text.startswith(place) else f"{place}: {text}")
            return None


def check_recipe(recipe: Recipe) -> Check:
    """Look at everything that a build needs, and build nothing: no weights are read.

    Args:
        recipe: from `read_recipe`.

    Returns:
        all that is wrong with it, and what it will take.
    """
    check = Check(recipe, list(recipe.problems))
    check.attempt("output_dir", lambda: _check_folder(Path(recipe.output_dir)))
    check.args = check.attempt("args", lambda: anchor_args(recipe, {}))
    if recipe.bridge is not None:
        check.bridge = check.attempt("bridge.args", lambda: bridge_args(recipe))
    head = None if recipe.source is None else _head(check, check.args or default_args(recipe))
    check.tokenizer = None if head is None else head.tokenizer
    _check_data(check)
    if head is not None:
        plan_costs(check, head.architecture, check.attempt("source", lambda: _source_parameters(check)))
        _check_lengths(check, head.architecture)
        if not check.problems:
            done = check.attempt("output_dir", lambda: finished_anchors(Path(recipe.output_dir), head, check.steps))
            check.finished = len(done or {})
            check.attempt("output_dir", lambda: check_unchanged(recipe))
        _check_disk(check)
    return check


def plan_costs(check: Check, head: Architecture, source_parameters: int | None = None) -> None:
    """Resolve the anchors of a recipe from the largest down, and estimate what each takes.

    Args:
        check: `steps`, `costs`, `speed` and `problems` are filled.
        head: the largest anchor.
        source_parameters: of the source, where there is a bridge.
    """
    recipe, args = check.recipe, check.args or default_args(check.recipe)
    speed = check.speed = measure_speed(args, head.sizes["width"])
    names, upper = [anchor_name(head.num_parameters)], head
    if check.bridge is not None and source_parameters is not None:
        costs = (source_parameters, head, check.bridge, recipe.calibration_tokens, speed)
        check.costs.append(bridge_cost(names[0], *costs))
    else:
        check.costs.append(head_cost(names[0], head, args, recipe.calibration_tokens, speed))
    for position, anchor in enumerate(recipe.anchors):
        place = f"anchors[{position}]"
        # Where the arguments of all are wrong, the shapes are still looked at.
        read = partial(anchor_args, recipe, anchor.args)
        own = args if check.args is None else check.attempt(f"{place}.args", read)
        if own is None:
            continue
        step = check.attempt(place, lambda: plan_step(upper, anchor.what, position, own, None, names))  # noqa: B023
        if step is None:
            continue
        check.steps.append(step)
        check.costs.append(anchor_cost(upper, step, recipe.calibration_tokens, speed))
        names, upper = [*names, step.name], step.architecture


def _head(check: Check, args: DistillConfig) -> Head | None:
    """The largest anchor as `build_chain` would make it; where it is, its config and its tokenizer are right."""
    recipe = check.recipe
    assert recipe.source is not None
    origin = Source(recipe.source.name, recipe.source.revision)
    check.attempt("source", lambda: _check_weights(recipe.source.name))  # type: ignore[union-attr]
    if recipe.source.revision is not None and Path(recipe.source.name).is_dir():
        check.problems.append(
            f"source.revision: {recipe.source.name} is a folder, which has no revision {recipe.source.revision!r}. "
            "Leave it out, or name a model on the Hub."
        )
    own = [anchor.args for anchor in recipe.anchors] + ([recipe.bridge.args] if recipe.bridge else [])
    special = check.attempt("args", lambda: SpecialTokens.of([recipe.args, *own])) or SpecialTokens()
    if recipe.bridge is None:
        return check.attempt("source", lambda: source_head(origin, None, args, None, special))
    check.attempt("bridge.model", lambda: _check_weights(recipe.bridge.model))  # type: ignore[union-attr]
    if check.bridge is None:
        return None
    step = BridgeStep(recipe.bridge.model, args=check.bridge)
    places = (None, None, Path(recipe.output_dir))
    return check.attempt("bridge", lambda: bridged_head(step, origin, None, args, *places, special))


def _check_weights(name: str) -> None:
    """Refuse a model folder whose files do not hold its weights; of a model on the Hub loading does."""
    if (Path(name) / "config.json").exists():
        check_checkpoint(name, role="model")


def _check_data(check: Check) -> None:
    recipe = check.recipe
    trained = [
        ("data", recipe.data),
        *((f"anchors[{n}].data", anchor.data) for n, anchor in enumerate(recipe.anchors)),
    ]
    trained += [("bridge.data", recipe.bridge.data)] if recipe.bridge else []
    held_out = recipe.evaluation.data if recipe.evaluation else ()
    for place, parts in [*trained, ("evaluation.data", held_out)]:
        columns = [check.attempt(part.where, partial(check_data, part, check.tokenizer, check.args)) for part in parts]
        if None not in columns:
            check.attempt(place, partial(check_mix, parts, columns))
    for part in held_out:
        both = (known for _, others in trained for known in others if shares_rows(part, known))
        if known := next(both, None):
            check.problems.append(
                f"{part.where}: {part.name} ({part.split}) is trained on, too ({known.where}: {known.split}), so its "
                "loss would say nothing of other text. Name another file or split, or slices that share no row: "
                "train[:95%] and train[95%:]."
            )


def _check_lengths(check: Check, head: Architecture) -> None:
    """Rows and blocks within the positions of the models; sizes to measure within those of the anchors."""
    positions, evaluation = int(head.config.max_position_embeddings), check.recipe.evaluation
    lengths = [
        (f"anchors[{n}].args.max_length", step.args.max_length) for n, step in enumerate(check.steps) if check.args
    ]
    lengths = list({length: (place, length) for place, length in reversed(lengths)}.values())
    lengths += [("bridge.args.max_length", check.bridge.max_length)] if check.bridge else []
    lengths += [("evaluation.length", evaluation.length)] if evaluation else []
    # In place of a length that was refused there is the default, which nobody asked for.
    refused = {problem.partition(":")[0] for problem in check.recipe.problems}
    for place, length in lengths:
        if place in refused or (place.endswith("args.max_length") and "args.max_length" in refused):
            continue
        if length is not None and length > positions:
            check.problems.append(f"{place}: {length} tokens are more than the {positions} that the models can read.")
    if evaluation is None or len(check.costs) <= len(check.recipe.anchors):
        return
    largest, smallest = (check.costs[end].architecture.num_parameters for end in (0, -1))
    for number, size in enumerate(evaluation.sizes):
        if not smallest <= size <= largest:
            check.problems.append(
                f"evaluation.sizes[{number}]: {size:,.0f} parameters are not between the smallest anchor "
                f"({smallest:,}) and the largest ({largest:,}), where all targets lie."
            )


def _source_parameters(check: Check) -> int | None:
    """Of a source that a bridge begins with, of any architecture: counted on a model without memory."""
    recipe = check.recipe
    if recipe.bridge is None or recipe.source is None:
        return None
    config = Source(recipe.source.name, recipe.source.revision).config()
    try:
        return describe(config).num_parameters
    except ValueError:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).num_parameters()


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
            f"(weights, statistics, optimiser), and {format_bytes(check.disk_free)} are free. Make room, choose "
            "another disk, set args.save_total_limit to 1, or args.save_strategy to 'no' and go without resuming."
        )


def recipe_table(check: Check) -> Table:
    """One line an anchor, and one for all.

    Args:
        check: of a recipe.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"What {check.recipe.name} would build")
    for name in ("anchor", "parameters", "shape", "disk", "checkpoints", "tokens", "memory", "time"):
        table.add_column(name, justify="left" if name in ("anchor", "shape") else "right")
    for number, cost in enumerate(check.costs):
        table.add_row(*_cells(cost, finished=number < check.finished))
    left = check.costs[check.finished :]
    seconds = [cost.seconds for cost in left]
    table.add_section()
    table.add_row(
        "all" if not check.finished else "left",
        "",
        "",
        format_bytes(sum(cost.disk for cost in left)),
        format_bytes(max((cost.checkpoints for cost in left), default=0)),
        _count([cost.tokens for cost in left]),
        format_bytes(max((cost.memory for cost in left), default=0)),
        _time(None if None in seconds else sum(second or 0 for second in seconds)),
    )
    return table


def how_estimated(check: Check) -> str:
    """Where the numbers of the table come from, in a few sentences.

    Args:
        check: of a recipe.
    """
    lines = [
        "Disk: weights and statistics (0.15 of the weights in bfloat16); checkpoints are there while an anchor is "
        f"trained. Free: {format_bytes(check.disk_free)}.",
        "Tokens: those of full rows; shorter rows that are not packed have fewer.",
        "Memory: weights of teacher and student, gradients, AdamW's moments, the activations of a micro-batch and "
        "0.5 GB of libraries, on one device, with nothing sharded.",
    ]
    if check.speed is not None:
        lines.append(_speed(check.speed))
    limits = [(cost.name, cost.architecture.engine_limit(chosen=False)) for cost in check.costs]
    lines += [f"{name}: {limit}" for name, limit in limits if limit]
    return "\n".join(lines)


def _speed(speed: Speed) -> str:
    products = speed.products / 1e9
    told = f"{products:,.0f}" if products >= 10 else f"{products:.2g}"
    measured = f"a matrix product does {told} GFLOP/s on {speed.device} now"
    share = f"{speed.training / speed.products:.2g} of that is assumed in training"
    known = "within a factor of two or so" if speed.device == "cpu" else "not compared with any run on such a device"
    return f"Time: {measured}, {share}, {known}; evaluation is not counted."


def _cells(cost: Cost, finished: bool) -> list[str]:
    cells = [cost.name, format_count(cost.architecture.num_parameters), describe_shape(cost.architecture.shape)]
    if finished:
        return [*cells, *["finished", "", "", "", ""]]
    return [
        *cells,
        format_bytes(cost.disk),
        format_bytes(cost.checkpoints),
        _count([cost.tokens]),
        format_bytes(cost.memory),
        _time(cost.seconds),
    ]


def _count(tokens: list[int | None]) -> str:
    known = [count for count in tokens if count is not None]
    return format_count(sum(known)) if len(known) == len(tokens) else "by epochs"


def _time(seconds: float | None) -> str:
    return "not known" if seconds is None else f"about {format_seconds(seconds)}"
