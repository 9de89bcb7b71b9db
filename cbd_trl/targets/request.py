"""The request made of `from_chain`, and the target that it leads to. No weight is read here."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real

import torch
from transformers.utils import logging

from cbd_trl.architectures import Architecture
from cbd_trl.chain.anchor import Anchor
from cbd_trl.chain.chain import Chain
from cbd_trl.chain.manifest import STATISTICS_FILE, weight_files
from cbd_trl.shapes.budget import Budget, ParameterCount
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.shapes.largest import largest_shapes, spread_within
from cbd_trl.shapes.solve import solve_target
from cbd_trl.shapes.spread import spread_targets
from cbd_trl.targets.limits import Limits
from cbd_trl.targets.operators import DEFAULT_OPERATOR, OPERATORS, Pair
from cbd_trl.utils.formatting import format_count

logger = logging.get_logger(__name__)

# The operator of a target that is an anchor as it is.
ANCHOR = "anchor"


@dataclass(frozen=True)
class Request:
    """The arguments of `from_chain` that choose the target; `size` is in the unit of `budget`.

    With `limits` the size is what `within_limits` finds.

    Raises:
        ValueError: one that is invalid whatever the chain.
    """

    size: float | None = None
    config: Mapping[str, int] | None = None
    operator: str = DEFAULT_OPERATOR
    alpha: float | None = None
    tolerance: float = 0.03
    shape_search: int | None = None
    budget: type[Budget] = ParameterCount
    limits: Limits | None = None

    def __post_init__(self) -> None:
        if self.operator not in OPERATORS:
            raise ValueError(f"Unknown operator {self.operator!r}. Operators: {', '.join(OPERATORS)}.")
        if self.alpha is not None and OPERATORS[self.operator].alpha is None:
            mixing = [name for name, row in OPERATORS.items() if row.alpha is not None]
            raise ValueError(
                f"alpha={self.alpha} has no meaning for operator={self.operator!r}, which mixes nothing. Leave it "
                f"out, or use {' or '.join(repr(name) for name in mixing)}."
            )
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must lie between 0 (the upper anchor alone) and 1 (the lower one).")
        if self.size is None and not self.config and self.limits is None:
            raise ValueError(
                "No size or shape was requested. Give num_parameters=138e6, or config={'num_hidden_layers': 20}, or "
                "both, or memory_limit='250MB'; `Chain.sizes()` lists what a chain can make."
            )
        size = self.size
        is_number = isinstance(size, Real) and not isinstance(size, bool)
        if size is not None and not (is_number and 0 < size < math.inf):
            raise ValueError(
                f"{self.budget.name}={size!r} must be a positive number of {self.budget.unit}, for example 138e6 or "
                "138_000_000."
            )
        if self.shape_search is not None:
            self._check_shape_search(self.shape_search)
        for field, value in (self.config or {}).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"config: {field} must be a positive integer, got {value!r}. `Chain.sizes()` lists values."
                )

    def _check_shape_search(self, count: object) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 2:
            raise ValueError(
                f"shape_search={count!r} must be a number of shapes to compare, at least 2, such as 16. None takes "
                "the shape on the line between the anchors."
            )
        if self.config or (self.size is None and self.limits is None):
            raise ValueError(
                f"shape_search={count} compares shapes of one size, and config={dict(self.config or {})} "
                f"gives the shape. Give {self.budget.name} alone, or leave shape_search out."
            )
        if OPERATORS[self.operator].depths != "blocks":
            raise ValueError(
                f"shape_search={count} scores what whole blocks make, and operator={self.operator!r} takes layers in "
                f"another way. Leave one of them out; {DEFAULT_OPERATOR!r} is the operator without it."
            )


@dataclass(frozen=True)
class Target:
    """The anchors, the shape and the mix that a request leads to.

    Args:
        anchors: the upper and the lower one; a single one where the target is that anchor.
        architecture: the shape, in a config cut from the upper anchor's.
        operator: the requested one, `ANCHOR` where the target is one.
        alpha: share of the lower anchor where something is mixed, by the size unless it was requested.
        score: what a search of shapes compares, less is better (see `shape_search`); None without one.
    """

    anchors: tuple[Anchor, ...]
    architecture: Architecture
    operator: str
    alpha: float | None = None
    score: float | None = None

    @property
    def files(self) -> dict[str, list[str]]:
        """List the files that it is made from, {anchor: names}.

        These are the tensors of each, the statistics of the upper one where a width differs, and what goes with its
        tokenizer.
        """
        upper, lower = self.anchors[0], self.anchors[-1]
        used = {anchor.name: ["config.json", *weight_files(anchor.files)] for anchor in self.anchors}
        used[upper.name] = [*upper.small_files, *weight_files(upper.files)]
        if upper.architecture().sizes != lower.architecture().sizes and STATISTICS_FILE in upper.files:
            used[upper.name].append(STATISTICS_FILE)
        return used


def find_targets(chain: Chain, request: Request) -> list[Target]:
    """Find the pair of anchors, the shapes and the mixes for a request: one, or with `shape_search` as many as that.
    The first has the shape on the line between the anchors.

    An anchor's own shape, however it is requested (by its size, one near it, some of its fields), is that anchor, as
    it is for every operator and without alpha at its end of a pair: sizes are continuous across the anchors of a
    chain. Only `slice` at the smallest anchor's shape and `expand` at the largest one's make a new model: there is
    no pair in which they would keep the anchor.

    Raises:
        ValueError: a size, shape or operator that is out of reach; the message names what is not.
    """
    own = [anchor for anchor in chain.anchors if request.alpha is None and _keeps(chain, anchor, request.operator)]
    for anchor in own:
        if _names(request, anchor):
            return [Target((anchor,), anchor.architecture(), ANCHOR)]
    upper, lower = chain.pair_for(request.size, request.config, request.tolerance, request.budget)
    blocks, operator = lower.block_map or [], OPERATORS[request.operator]
    above, below = upper.architecture(), lower.architecture()
    rule = (request.tolerance, operator.depths, lower.kept_layers, lower.block_costs, request.budget)
    if request.shape_search is None or request.size is None:
        shapes = [solve_target(above, below, blocks, request.size, request.config, *rule)]
    elif request.limits is not None:
        line = solve_target(above, below, blocks, request.size, None, *rule)
        shapes = spread_within(
            above, below, blocks, line, request.limits.share(above), request.shape_search, *rule[:-1]
        )
    else:
        shapes = spread_targets(above, below, blocks, request.size, request.shape_search, *rule)
    for anchor in own:
        if anchor.shape == shapes[0]:
            return [Target((anchor,), anchor.architecture(), ANCHOR)]
    # Operators plan a shape without reading weights.
    pair = open_pair(upper, lower)
    found = []
    for fields in shapes:
        # An anchor that a search meets is no shape between the two.
        if fields not in (upper.shape, lower.shape) or fields is shapes[0]:
            architecture = operator.architecture(pair, cut_architecture(above, fields))
            alpha = operator.default_alpha(pair, architecture)
            if alpha is not None and request.alpha is not None:
                alpha = request.alpha
            found.append(Target((upper, lower), architecture, request.operator, alpha))
    return found


def within_limits(chain: Chain, request: Request) -> Request:
    """Give a request with limits the size of the largest target on the lines between the anchors that keeps them.

    Raises:
        ValueError: the smallest anchor does not keep them, or the context is longer than the models read.
    """
    limits = request.limits
    if limits is None:
        return request
    limits.check_context(chain.source.architecture())
    largest, smallest = chain.anchors[0], chain.anchors[-1]
    if limits.keeps(largest.architecture()):
        used = limits.explain(largest.architecture())
        logger.warning(f"The largest anchor, {largest.name}, is all that this chain has for these limits: {used}.")
        return replace(request, size=largest.num_parameters)
    operator = OPERATORS[request.operator]
    for upper, lower in itertools.pairwise(chain.anchors):
        above, below = upper.architecture(), lower.architecture()
        rule = (request.tolerance, operator.depths, lower.kept_layers, lower.block_costs)
        first = None
        for fields, on_line in largest_shapes(above, below, lower.block_map or [], limits.share(above), *rule):
            first = first or fields
            if not on_line:
                continue
            size = cut_architecture(above, fields).num_parameters
            # As it is made: an operator may take other layers, and at an anchor's size it is that anchor.
            target = find_target(chain, replace(request, size=size, shape_search=None, limits=None))
            if target.architecture.shape == fields and limits.keeps(target.architecture):
                _mention_larger(request, size, cut_architecture(above, first))
                return replace(request, size=size)
    smaller = "" if limits.memory_limit is None else "choose a smaller storage or a shorter context, "
    raise ValueError(
        f"The smallest anchor, {smallest.name}, takes {limits.explain(smallest.architecture())}. Raise the limit, "
        f"{smaller}or build a chain with a smaller anchor."
    )


def _mention_larger(request: Request, size: int, other: Architecture) -> None:
    """Log that a shape off the line is larger, and keeps the limits, too."""
    if request.shape_search is None and other.num_parameters > size * (1 + request.tolerance):
        logger.warning(
            f"The largest model on the line between the anchors that keeps the limits has {format_count(size)} "
            f"parameters. Another shape of {format_count(other.num_parameters)} keeps them, too ({other.shape}): "
            "shape_search=16 compares such shapes."
        )


def find_target(chain: Chain, request: Request) -> Target:
    """Find the target on the line between two anchors (see `find_targets`)."""
    return find_targets(chain, request)[0]


def open_pair(upper: Anchor, lower: Anchor) -> Pair:
    """Open two neighboring anchors without their weights and statistics."""
    assert lower.block_map is not None and lower.kept_layers is not None
    return Pair(
        {},
        upper.architecture(),
        {},
        lower.architecture(),
        None,
        lower.block_map,
        lower.kept_layers,
        lower.block_costs,
        lower.alpha_power,
    )


def _keeps(chain: Chain, anchor: Anchor, operator: str) -> bool:
    """Check whether the operator leaves an anchor as it is in one of the pairs that it is part of."""
    ends: dict[tuple[str, ...], Anchor] = {("upper",): chain.anchors[-1], ("lower",): chain.anchors[0]}
    return anchor is not ends.get(OPERATORS[operator].sources)


def _names(request: Request, anchor: Anchor) -> bool:
    """Check whether the request is for exactly this anchor's size or shape."""
    fields = request.config or {}
    if any(anchor.shape.get(field) != value for field, value in fields.items()):
        return False
    if request.size is None:
        return set(fields) == set(anchor.shape)
    return anchor.size(request.budget) == int(request.size)


def target_dtype(dtype: torch.dtype | str | None, anchor: Anchor) -> torch.dtype:
    """Resolve the dtype of a target: the requested one, by default that of the anchor above.

    Raises:
        ValueError: it is not a floating-point type.
    """
    wanted = anchor.dtype if dtype is None or dtype == "auto" else dtype
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype={dtype!r} must be a floating-point type, such as torch.bfloat16, 'float32', or None for that "
            "of the anchors."
        )
    return found
