"""Find the shape of an anchor that is requested by its size: measure what cuts of several shapes lose untrained.

Which of layers, stream, heads and FFN can be cut most cheaply differs between models. What `build_chain` makes before
it distills, the least-squares cut after its refit, is made of every shape, and compared with the anchor above by KL on
text that the refit did not use.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.architectures import Architecture
from cbd_trl.architectures.registry import describe_shape
from cbd_trl.build.plan import ShapeSearch, Step
from cbd_trl.build.student import block_search, choose_blocks, initial_student, refit_student
from cbd_trl.build.training import WORK
from cbd_trl.chain.chain import Anchor
from cbd_trl.losses.held_out import HeldOutDivergence
from cbd_trl.shapes.spread import spread_anchors
from cbd_trl.surgery.block_search import BlockSearch
from cbd_trl.surgery.blocks import Block
from cbd_trl.utils.blocks import TokenBlocks, calibration_length, token_blocks
from cbd_trl.utils.files import Results
from cbd_trl.utils.formatting import format_count
from cbd_trl.utils.progress import Progress

# Tokens that shapes are compared on, behind those that their cuts are refitted on.
SCORED_TOKENS = 4096
_SCORES = "scores.json"


@dataclass(frozen=True)
class SearchText:
    """The text of a search.

    Args:
        fit: what cuts are refitted on, the beginning of the training text.
        scored: the rows behind it, which no cut has seen.
    """

    fit: TokenBlocks
    scored: TokenBlocks

    @classmethod
    def read(
        cls, config: Any, dataset: Any, args: Any, tokenizer: PreTrainedTokenizerBase, calibration_tokens: int
    ) -> "SearchText":
        """Read the beginning of a training text: what an anchor is refitted on, and `SCORED_TOKENS` behind it.

        Args:
            config: of the anchor above.
            dataset, args: of the training, without a chat template of its own.
            tokenizer: of the chain.
            calibration_tokens: as of `build_chain`.

        Raises:
            ValueError: it is not even two rows.
        """
        fit = token_blocks(dataset, tokenizer, calibration_tokens, calibration_length(config), args)
        length = fit.input_ids.shape[1]
        wanted = (len(fit) + max(1, SCORED_TOKENS // length)) * length
        return cls.of(token_blocks(dataset, tokenizer, wanted, length, args), len(fit))

    @classmethod
    def of(cls, blocks: TokenBlocks, fit: int) -> "SearchText":
        """Split the beginning of a training text.

        Args:
            blocks: that beginning.
            fit: how many blocks an anchor is refitted on; three quarters where the text ends before them.

        Raises:
            ValueError: there is one block of text.
        """
        if len(blocks) < 2:
            raise ValueError(
                f"The dataset holds {blocks.input_ids.numel()} tokens, one row of calibration text. shape_search "
                "refits on one part of it and compares on another: give a dataset of two rows or more, or leave "
                "shape_search out."
            )
        if fit >= len(blocks):
            fit = len(blocks) - max(1, len(blocks) // 4)
        parts = (slice(None, fit), slice(fit, None))
        return cls(*(TokenBlocks(blocks.input_ids[part], blocks.labels[part], blocks.start) for part in parts))

    def digest(self) -> str:
        """Hash both parts."""
        parts = [part.input_ids.numpy().tobytes() for part in (self.fit, self.scored)]
        return " ".join(hashlib.sha256(part).hexdigest() for part in parts)


def search_folder(output_dir: Path, upper: str) -> Path:
    """Name the folder of what is measured for the anchor below another one, until it is finished."""
    return output_dir / WORK / f"below-{upper}"


def blocks_file(folder: Path, depth: int) -> Path:
    """Name the file of the blocks that a search chose for a depth."""
    return folder / f"blocks-{depth}.json"


def searched_steps(
    upper: Architecture, position: int, size: float, search: ShapeSearch, plan: Callable[[ShapeSearch], list[Step]]
) -> list[list[Step]]:
    """Plan the rest of a chain for every shape that is compared.

    Args:
        upper: the anchor above.
        position: of the anchor among those requested.
        size: requested.
        search: how many shapes, and of what size.
        plan: the steps of the whole chain, of a search with the shape.

    Returns:
        the steps for each shape below which the rest can be made; that of `solve_anchor` first, where it is one.

    Raises:
        ValueError: there is none.
    """
    plans, errors = [], []
    for fields in spread_anchors(upper, size, search.shapes, budget=search.budget):
        try:
            plans.append(plan(search.with_chosen(position, fields)))
        except ValueError as error:
            errors.append(error)
    if not plans:
        raise errors[0]
    return plans


def score_shapes(
    folder: Path,
    upper: Anchor,
    steps: Sequence[Step],
    search: ShapeSearch,
    text: SearchText,
    device: Any,
    train: Callable[[Step, PreTrainedModel, list[Block], Path], PreTrainedModel],
) -> list[dict[str, Any]]:
    """Measure what shapes of one size lose of the anchor above; what an earlier run measured is read.

    A shape that is larger or smaller than requested is charged or credited what the line from it to the anchor above
    gives for the difference.

    Args:
        folder: where results are kept.
        upper: the anchor above.
        steps: to the shapes.
        search: its `trainings` of the best are trained, too.
        text: to refit and to compare on.
        device: to measure on.
        train: trains an untrained cut of a step and its blocks for `search.training_steps`, in a folder, and returns
            the model.

    Returns:
        for each step its `shape`, `size` and `score`, the KL in nats per scored token at the requested size, and of
        the best `trained`, the same after training. Those of other processes are the main one's.
    """
    measure = _Measure(folder, upper, search, text, device)
    untrained = {number: measure.untrained(step) for number, step in enumerate(Progress("Comparing shapes", steps))}
    best = sorted(untrained, key=lambda number: untrained[number])[: search.trainings]
    trained = {number: measure.trained(steps[number], train) for number in best}
    measure.close()
    return [
        {
            "shape": step.architecture.shape,
            "size": search.budget.of(step.architecture),
            "score": untrained[number],
            **({"trained": trained[number]} if number in trained else {}),
        }
        for number, step in enumerate(steps)
    ]


def best_shape(scores: Sequence[Mapping[str, Any]]) -> int:
    """Choose from `score_shapes`: the least after training where shapes were trained, else the least; of equals the
    first."""
    trained = [number for number, entry in enumerate(scores) if "trained" in entry]
    key = "trained" if trained else "score"
    return min(trained or range(len(scores)), key=lambda number: scores[number][key])


def score_table(scores: Sequence[Mapping[str, Any]]) -> str:
    """Format the scores for the log, the best first.

    Args:
        scores: of `score_shapes`.
    """
    chosen = scores[best_shape(scores)]
    lines = []
    for entry in sorted(scores, key=lambda entry: (entry.get("trained", float("inf")), entry["score"])):
        trained = f", {entry['trained']:.4f} trained" if "trained" in entry else ""
        shape = f"{describe_shape(entry['shape'], short=True)} ({format_count(entry['size'])})"
        lines.append(f"  {shape}: {entry['score']:.4f}{trained}{' <- chosen' if entry is chosen else ''}")
    return "\n".join(["KL to the anchor above, nats per token:", *lines])


class _Measure:
    """Measures shapes one after the other; the anchor above is loaded for the first that is not known.

    Args:
        folder, upper, search, text, device: as of `score_shapes`.
    """

    def __init__(self, folder: Path, upper: Anchor, search: ShapeSearch, text: SearchText, device: Any) -> None:
        self._folder, self._upper, self._search, self._text, self._device = folder, upper, search, text, device
        self._main = PartialState().is_main_process
        self._results = Results(folder / _SCORES) if self._main else Results()
        self._key = f"{sorted(upper.files.items())} {text.digest()}"
        self._teacher: Any = None
        self._blocks: BlockSearch | None = None
        self._divergence: HeldOutDivergence | None = None

    def untrained(self, step: Step) -> float:
        """Measure a cut as it is before training."""

        def measured() -> float | None:
            student = self._student(step)[0]
            return None if student is None else self._loss(student)

        return self._at_size(step, self._known(step, "untrained", measured))

    def trained(
        self, step: Step, train: Callable[[Step, PreTrainedModel, list[Block], Path], PreTrainedModel]
    ) -> float:
        """Measure a cut after a short training, which every process takes part in."""

        def measured() -> float | None:
            student, blocks = self._student(step, everywhere=True)
            model = train(step, student, blocks, self._folder / "training")
            return self._loss(model) if self._main else None

        return self._at_size(step, self._known(step, f"{self._search.training_steps} steps", measured))

    def close(self) -> None:
        """Free the anchor above."""
        self._teacher = self._blocks = self._divergence = None
        clear_device_cache(garbage_collection=True)

    def _known(self, step: Step, what: str, measured: Callable[[], float | None]) -> float:
        key = hashlib.sha256(f"{self._key} {json.dumps(step.architecture.shape)} {what}".encode()).hexdigest()
        found = [self._results.get(key)]
        broadcast_object_list(found)
        if found[0] is None:
            found = [measured()]
            if self._main:
                self._results.put(key, found[0])
            broadcast_object_list(found)
        assert found[0] is not None
        return float(found[0])

    def _student(self, step: Step, everywhere: bool = False) -> tuple[Any, list[Block]]:
        """Make the untrained cut of a step, as `build_chain` does; None where another process measures it."""
        if self._teacher is None:
            self._teacher = self._upper.load_model()
            self._teacher.to(self._device)
            self._blocks = block_search(self._teacher, self._text.fit.input_ids)
        tokens, file = self._text.fit.input_ids, blocks_file(self._folder, step.architecture.depth)
        blocks = choose_blocks(file, self._teacher, step, tokens, self._blocks)
        if not (self._main or everywhere):
            return None, blocks
        student: Any = initial_student(self._upper, step, blocks)
        refit_student(student.to(self._device), self._teacher, blocks, tokens)
        return student, blocks

    def _loss(self, model: Any) -> float:
        if self._divergence is None:
            self._divergence = HeldOutDivergence(self._teacher, self._text.scored)
        return self._divergence(model.to(self._device))

    def _at_size(self, step: Step, score: float) -> float:
        """Correct a score to the requested size."""
        assert step.search is not None
        budget = self._search.budget
        whole, size = budget.of(self._upper.architecture()), step.search["size"]
        wanted = size if size > 1 else size * whole
        return score * (whole - wanted) / (whole - budget.of(step.architecture))


def chosen_step(step: Step, scores: Sequence[Mapping[str, Any]]) -> Step:
    """Give the chosen step the record of how it was found."""
    return replace(step, search={**(step.search or {}), "scores": [dict(entry) for entry in scores]})
