"""Measure chains: loss, bits per byte and tasks of every anchor and of a sweep of sizes, with controls."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset

from cbd_trl.bridge.token_bytes import token_bytes
from cbd_trl.chain.chain import Chain
from cbd_trl.losses.held_out import held_out_loss
from cbd_trl.losses.reduction import Scored
from cbd_trl.report.sweep import RANDOM, REPORTED, SweepTarget, fingerprint, sweep
from cbd_trl.report.tasks import task_probes
from cbd_trl.targets.operators import DEFAULT_OPERATOR, OPERATORS
from cbd_trl.targets.request import ANCHOR, Request, find_target
from cbd_trl.utils.blocks import TokenBlocks, token_blocks
from cbd_trl.utils.datasets import load_rows, sft_dataset
from cbd_trl.utils.files import Results
from cbd_trl.utils.formatting import did_you_mean, format_count

CONTROLS = (*REPORTED, RANDOM)
# Sizes between two neighboring anchors, where none are requested.
_SIZES_OF_A_PAIR = 3
_BLOCK_LENGTH = 256


@dataclass(frozen=True)
class ReportOptions:
    """Options of a report.

    Args:
        sizes: numbers of parameters; None for three between each two neighboring anchors.
        operators: names of `from_chain`'s operators, and "random" for untrained models; the first one
            decides a size's shape.
        tasks: of lm-eval.
        include_path: folder of the user's own task files.
        limit: the first examples of each task only; None for all.
        blocks: of held-out text.
        block_length: tokens in each; None for 256, or as many as the models have positions for.
        batch_size: blocks, or rows of a task, in one forward pass.
        tolerance: largest relative distance from a size.
        text_field: the column of the text, where the rows have one of their own.
        seed: of the random models.

    Raises:
        ValueError: an unknown operator, or a number out of range.
    """

    sizes: Sequence[float] | None = None
    operators: Sequence[str] = CONTROLS
    tasks: Sequence[str] = ()
    include_path: str | Path | None = None
    limit: int | None = None
    blocks: int = 64
    block_length: int | None = None
    batch_size: int = 4
    tolerance: float = 0.03
    text_field: str = "text"
    seed: int = 0

    def __post_init__(self) -> None:
        known = (*OPERATORS, RANDOM)
        for name in self.operators:
            if name not in known:
                raise ValueError(
                    f"Unknown operator {name!r}.{did_you_mean(name, known)} Operators: {', '.join(known)}."
                )
        if not self.operators or self.operators[0] == RANDOM:
            raise ValueError(
                f"operators={list(self.operators)}: the first one decides the shape of a size, which random models "
                f"only copy. Begin with {DEFAULT_OPERATOR}."
            )
        for name, least in (("blocks", 1), ("block_length", 2), ("batch_size", 1), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}, or there is nothing to measure.")

    @property
    def built(self) -> list[str]:
        """The operators of `from_chain`, without "random"."""
        return [name for name in self.operators if name != RANDOM]


def measure_chains(
    chains: Sequence[Chain],
    rows: Iterable[Mapping[str, Any]],
    options: ReportOptions,
    results: Results | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure chains on the same text; every mistake is found before the first model is loaded.

    Args:
        chains: one, or several to compare.
        rows: held-out text that no anchor was trained on, in any SFT format.
        options: what to measure.
        results: what an earlier run measured; this one adds to it.
        on_step: called before each measurement with its label, its number from 0, and how many there are.

    Returns:
        for each chain what `sweep` returns, and "name", "path", "revision", "model_type", "tokenizer" (its hash),
        "text" {"blocks", "block_length", "start" (ids in front of each), "tokens" (scored), "bytes" (theirs)} and
        "bits_per_byte" of every anchor and {operator: value} of every target. The last two are None where the bytes
        of the tokens are not known.

    Raises:
        ValueError: a size cannot be made, the text is too short, or a task is not known.
    """
    _check_sizes_inside(chains, options)
    rows = held_out_rows(rows, options.text_field)
    jobs = [_Job(chain, name, options) for chain, name in zip(chains, _names(chains), strict=True)]
    for job in jobs:
        job.read(rows)
    steps = [job.steps for job in jobs]
    reports = []
    for number, job in enumerate(jobs):

        def show(label: str, step: int, total: int, before: int = sum(steps[:number]), job: _Job = job) -> None:
            if on_step is not None:
                on_step(label if len(jobs) == 1 else f"{job.name}: {label}", before + step, sum(steps))

        reports.append(job.measure(results or Results(), show))
    return reports


def _reachable_targets(chain: Chain, options: ReportOptions) -> list[SweepTarget]:
    """The sizes of a report as shapes, with the operators that can make each.

    Args:
        chain: whose sizes.
        options: name the sizes; those outside this chain are left to the others of the comparison.

    Raises:
        ValueError: a size that cannot be made.
    """
    first = options.built[0]
    if options.sizes is None:
        sizes, tolerance = _spread(chain), 1.0
    else:
        sizes, tolerance = [size for size in options.sizes if _inside(chain, size, options)], options.tolerance
    targets: dict[str, SweepTarget] = {}
    for size in sizes:
        try:
            found = find_target(chain, Request(size, operator=first, tolerance=tolerance))
        except ValueError as error:
            raise ValueError(f"The size {format_count(size)} cannot be measured. {error}") from error
        if options.sizes is None and found.operator == ANCHOR:
            continue
        shape = found.architecture.shape
        names = [name for name in options.built if _can_make(chain, shape, name)]
        targets[fingerprint(shape)] = SweepTarget(config=shape, operators=names)
    return list(targets.values())


def _can_make(chain: Chain, shape: Mapping[str, int], operator: str) -> bool:
    """Whether an operator can make a shape: `patch` makes no widths."""
    try:
        find_target(chain, Request(config=shape, operator=operator))
    except ValueError:
        return False
    return True


def _spread(chain: Chain) -> list[float]:
    sizes = [anchor.num_parameters for anchor in chain.anchors]
    steps = _SIZES_OF_A_PAIR + 1
    return [upper + (lower - upper) * step / steps for upper, lower in pairwise(sizes) for step in range(1, steps)]


def _inside(chain: Chain, size: float, options: ReportOptions) -> bool:
    largest, smallest = chain.anchors[0].num_parameters, chain.anchors[-1].num_parameters
    return smallest * (1 - options.tolerance) <= size <= largest * (1 + options.tolerance)


def _check_sizes_inside(chains: Sequence[Chain], options: ReportOptions) -> None:
    for size in options.sizes or ():
        if not any(_inside(chain, size, options) for chain in chains):
            ranges = ", ".join(
                f"{chain.name_or_path} from {format_count(chain.anchors[-1].num_parameters)} to "
                f"{format_count(chain.anchors[0].num_parameters)}"
                for chain in chains
            )
            raise ValueError(
                f"The size {format_count(size)} lies outside what is to be measured ({ranges}): a chain makes the "
                "sizes between its anchors. Leave it out, or leave --sizes out for sizes that exist."
            )


def _names(chains: Sequence[Chain]) -> list[str]:
    """A name for each: its last folder, with as many of those above as tell it from the others."""
    parts = [Path(chain.name_or_path).resolve().parts for chain in chains]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{chain.name_or_path} ({number})" for number, chain in enumerate(chains, 1)]


class _Job:
    """One chain, checked, then measured."""

    def __init__(self, chain: Chain, name: str, options: ReportOptions) -> None:
        self.chain = chain
        self.name = name
        self.options = options
        self.tokenizer = chain.tokenizer()
        self.targets = _reachable_targets(chain, options)
        self.probes = task_probes(
            options.tasks, self.tokenizer, options.include_path, options.limit, options.batch_size
        )
        positions = min(int(anchor.config().max_position_embeddings) for anchor in chain.anchors)
        self.block_length = options.block_length or min(_BLOCK_LENGTH, positions)
        if self.block_length > positions:
            raise ValueError(
                f"block_length={self.block_length} is more than the {positions} positions that the models of "
                f"{self.name} have. Ask for {positions} or fewer."
            )

    @property
    def steps(self) -> int:
        """How many models there are to measure."""
        controls = RANDOM in self.options.operators
        return len(self.chain.anchors) + sum(len(target.operators or ()) + controls for target in self.targets)

    def read(self, rows: Any) -> None:
        """Take the held-out text, in the chain's own tokens."""
        self.blocks = held_out_blocks(self.tokenizer, rows, self.block_length, self.options.blocks)

    def measure(self, results: Results, on_step: Callable[[str, int, int], None]) -> dict[str, Any]:
        report: dict[str, Any] = {
            "name": self.name,
            "path": self.chain.name_or_path,
            "revision": self.chain.revision,
            "model_type": self.chain.model_type,
            "tokenizer": self.chain.source.tokenizer_sha256,
            "text": {
                "blocks": len(self.blocks),
                "block_length": self.block_length,
                "start": list(self.blocks.start),
                "tokens": self.blocks.scored,
                "bytes": scored_bytes(self.tokenizer, self.blocks),
            },
        }
        report |= sweep(
            self.chain,
            self.targets,
            self.options.built,
            self._loss,
            results=results,
            key=fingerprint(self.blocks.input_ids, self.blocks.labels),
            seed=self.options.seed,
            random=RANDOM in self.options.operators,
            probes=self.probes,
            on_step=on_step,
        )
        for entry, anchor in zip(report["anchors"], self.chain.anchors, strict=True):
            entry["tokens_seen"] = anchor.tokens_seen
        add_bits_per_byte(report, self.tokenizer, self.blocks)
        return report

    def _loss(self, model: Any) -> float:
        return held_out_loss(model.to(PartialState().device), self.blocks, self.options.batch_size)


def held_out_rows(rows: Iterable[Mapping[str, Any]], column: str) -> Any:
    """Read held-out text as a dataset and check every row.

    Args:
        rows: of any SFT format.
        column: "text" measures whatever the format has, any other name that column alone.

    Returns:
        a `Dataset`, or an `IterableDataset`.

    Raises:
        ValueError: a row has no text there; the message names the columns that the rows have.
    """
    if column == "text":
        return sft_dataset(rows, "the held-out text")
    for row in rows:
        if not isinstance(row.get(column), str):
            found = f"{type(row[column]).__name__} in the column" if column in row else "no column"
            raise ValueError(
                f"A row of the held-out text has {found} {column!r}, where text is expected; its columns are "
                f"{sorted(row)}. Name one that holds text in every row, or leave --text_column (text_field) out: "
                "'text', chats, and prompts with completions are found by themselves."
            )
    return Dataset.from_dict({"text": [row[column] for row in rows]})


def held_out_blocks(tokenizer: Any, texts: Any, length: int, count: int) -> TokenBlocks:
    """Cut the first `count` blocks of `length` tokens of held-out text, each row read as training would read it.

    Args:
        tokenizer: a transformers tokenizer; special tokens written in the texts are read as such.
        texts: texts, or rows of any SFT format (chats are read in the chat template), in order until there are enough
            tokens. A plain text ends with the end-of-text token.
        length: T.
        count: N.

    Raises:
        ValueError: if the texts are too short.
    """
    if not isinstance(texts, Dataset | IterableDataset):
        texts = [{"text": text} if isinstance(text, str) else text for text in texts]
    blocks = token_blocks(texts, tokenizer, length * count, length)
    found = tuple(blocks.input_ids.shape)
    if found != (count, length):
        raise ValueError(
            f"The held-out texts fill {found[0]} blocks of {found[1]} tokens, {count} blocks of {length} are needed: "
            "the same number for every model. Give more texts, or fewer or shorter blocks (blocks, block_length)."
        )
    return blocks


def scored_bytes(tokenizer: Any, blocks: TokenBlocks) -> int | None:
    """Count the bytes of text that the scored tokens of the blocks stand for.

    Args:
        tokenizer: the one the blocks were made with.
        blocks: held-out text.

    Returns:
        their number; a special token, such as the end of a text, stands for none. None where the bytes of the tokens
        are not known (see `token_bytes`) or where they stand for no text: then there are no bits per byte.
    """
    try:
        texts = token_bytes(tokenizer)
    except ValueError:
        return None
    lengths = torch.tensor([len(data or b"") for data in texts])
    return int(lengths[Scored.of(blocks.labels).select_next(blocks.labels)].sum()) or None


def bits_per_byte(loss: float, tokens: int, num_bytes: int) -> float:
    """Convert a held-out loss to a unit that does not depend on the tokenizer.

    Args:
        loss: nats per scored token.
        tokens: scored tokens.
        num_bytes: bytes they stand for, from `scored_bytes`.
    """
    return loss * tokens / (math.log(2) * num_bytes)


def add_bits_per_byte(report: Mapping[str, Any], tokenizer: Any, blocks: TokenBlocks) -> None:
    """Put "bits_per_byte" beside every loss of a sweep, in place: None where the bytes of the tokens are not known.

    Args:
        report: what `sweep` returned; each anchor gets a number, each target {operator: number}.
        tokenizer: the one the blocks were made with.
        blocks: that the losses were measured on.
    """
    count = scored_bytes(tokenizer, blocks)

    def bits(loss: float) -> float | None:
        return None if count is None else bits_per_byte(loss, blocks.scored, count)

    for entry in report["anchors"]:
        entry["bits_per_byte"] = bits(entry["loss"])
    for entry in report["targets"]:
        entry["bits_per_byte"] = {name: bits(loss) for name, loss in entry["loss"].items()}


def load_held_out(name: str, split: str) -> Any:
    """Load rows of held-out text.

    Args:
        name: a file, or a dataset's Hub id.
        split: of the latter.

    Raises:
        ValueError: there is nothing in it, or no such file (see `load_rows`).
    """
    path = Path(name)
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"{name} is empty: there is no text to measure on. Give a file with held-out text.")
    rows = load_rows(name, split=split)
    if not len(rows):
        raise ValueError(f"{name} holds no rows of text: there is nothing to measure on.")
    return rows
