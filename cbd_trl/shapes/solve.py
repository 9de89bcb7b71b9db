"""From "138M parameters, please" to config fields. Nothing here touches a weight."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from cbd_trl.architectures import Architecture
from cbd_trl.shapes.candidates import Candidate, Grid, candidates, heads_for_width, widths
from cbd_trl.shapes.depths import Blocks, reachable_depths
from cbd_trl.shapes.smaller import target_architecture
from cbd_trl.surgery.blocks import Fits, anywhere, check_blocks, fitting_layers, spaced_layers

# Operators that replace whole blocks; the others can keep any number of layers.
_BLOCK_OPERATORS = ("nested", "patch")
# An anchor further than this from the size asked for is no answer (only at the small end of what can be cut).
_ANCHOR_TOLERANCE = 0.25


def solve_anchor(upper: Architecture, size: float) -> dict[str, int]:
    """The shape of an anchor of a given size below `upper`: fewer layers down to half of them, then narrower.

    Depths that leave the pattern of layers that engines have built in (`Architecture.fits`) are not on offer.

    Args:
        upper: architecture of the anchor above (or the source).
        size: above 1 a number of parameters, below 1 a ratio to that of `upper`.

    Returns:
        Config fields of the family.

    Raises:
        ValueError: the size is no positive number, not smaller than `upper`, or smaller than anything that can be cut
            from it.
    """
    total = upper.num_parameters
    if not _is_positive(size) or size >= total or size == 1:
        raise ValueError(
            f"An anchor's size must be a number of parameters below the {total:,} of the anchor above, or a ratio "
            f"between 0 and 1, got {size!r}."
        )
    wanted = size if size > 1 else size * total
    half = -(-upper.depth // 2)
    depths = [depth for depth in range(half, upper.depth) if _keeps_pattern(depth, upper.depth, upper.fits)]
    # Of a model in whose pattern no depth fits, only the width is changed.
    half = min(depths, default=upper.depth)
    shallower = Grid(upper, upper.sizes, upper.depth, depths, {})
    by_depth = list(candidates(shallower, wanted))
    if by_depth and min(option.num_parameters for option in by_depth) <= wanted:
        return _fields(upper, min(by_depth, key=lambda option: abs(option.num_parameters - wanted)))
    narrow = {**upper.sizes, "width": 0, "ffn": 0, "group": 0}
    options = by_depth + [
        o for o in candidates(Grid(upper, narrow, upper.depth, [half], {}), wanted) if o.num_parameters < total
    ]
    best = _nearest(options, wanted, _ANCHOR_TOLERANCE) if options else None
    if best is None or abs(best.num_parameters - wanted) > _ANCHOR_TOLERANCE * wanted:
        smallest = min((option.num_parameters for option in options), default=total)
        raise ValueError(
            f"No anchor of about {wanted:,.0f} parameters can be cut from one of {total:,} ({upper.shape}): the "
            f"smallest has {smallest:,}{f', the nearest {best.num_parameters:,}' if best else ''}. Ask for one of "
            "these, or give the anchor's config fields."
        )
    return _fields(upper, best)


def _is_positive(value: object) -> bool:
    """A positive number; True is none."""
    return isinstance(value, Real) and not isinstance(value, bool) and float(value) > 0


def solve_target(
    upper: Architecture,
    lower: Architecture,
    block_map: Blocks,
    num_parameters: float | None = None,
    config: Mapping[str, Any] | None = None,
    tolerance: float = 0.03,
    operator: str = "nested",
    kept: Sequence[int] | None = None,
) -> dict[str, int]:
    """The shape of a target between two anchors: the fields given exactly, the others on the line or near it.

    Args:
        upper, lower: architectures of the two anchors.
        block_map: for each lower layer the upper layers it stands for.
        num_parameters: size wanted; None: the fields that `config` leaves out go where those it gives are on the line.
        config: config fields to fix.
        tolerance: largest |size - num_parameters| / num_parameters.
        operator: `nested` and `patch` reach the depths that whole blocks give, the others every depth between. Where
            engines tell layers apart by position (`Architecture.fits`), depths that would leave one elsewhere are made
            only if `config` has them.
        kept: for each lower layer the upper layer it was cut from; None: the last of its block.

    Returns:
        All shape fields of the family.

    Raises:
        ValueError: nothing asked for, a field or size out of range, a shape that cannot be made, or none within
            `tolerance`; the message holds what is possible.
    """
    fields = dict(config or {})
    if num_parameters is None and not fields:
        raise ValueError(
            "Nothing was asked for: give num_parameters, or config with fields such as " + ", ".join(upper.shape) + "."
        )
    if num_parameters is not None and not _is_positive(num_parameters):
        raise ValueError(f"num_parameters must be a positive number, got {num_parameters!r}.")
    _check_pair(upper, lower)
    _check_range(upper, lower, fields)
    if num_parameters is not None:
        _check_size_range(upper, lower, num_parameters, tolerance)
    grid = _grid(upper, lower, block_map, kept, fields, operator)
    options = list(candidates(grid, num_parameters))
    if not options:
        raise ValueError(_impossible(grid, fields))
    if num_parameters is None:
        return _fields(upper, min(options, key=lambda option: option.strain))
    best = _nearest(options, num_parameters, tolerance)
    if abs(best.num_parameters - num_parameters) > tolerance * num_parameters:
        raise ValueError(_too_far(upper, options, num_parameters, tolerance, fields))
    return _fields(upper, best)


def list_sizes(
    upper: Architecture, lower: Architecture, block_map: Blocks, kept: Sequence[int] | None = None
) -> dict[str, Any]:
    """What `nested` can make between two anchors.

    Returns:
        `num_parameters`: [smallest, largest]; `shape`: for every config field the values on offer, ascending.
    """
    _check_pair(upper, lower)
    grid = _grid(upper, lower, block_map, kept, {}, "nested")
    low, high = lower.sizes, upper.sizes
    values = {
        "layer": list(grid.depths),
        "width": widths(grid),
        "ffn": list(range(low["ffn"], high["ffn"] + 1, grid.multiple("ffn"))),
        "group": list(range(low["group"], high["group"] + 1)),
    }
    groups_and_queries = [
        (group, query) for group in values["group"] for query in range(low["query"], high["query"] + 1)
    ]
    values["heads"] = sorted({group * query for group, query in groups_and_queries})
    return {
        "num_parameters": [lower.num_parameters, upper.num_parameters],
        "shape": {field: values[dim] for field, dim in upper.family.shape_fields.items()},
    }


def _grid(
    upper: Architecture,
    lower: Architecture,
    block_map: Blocks,
    kept: Sequence[int] | None,
    fields: Mapping[str, int],
    operator: str,
) -> Grid:
    check_blocks(block_map, lower.depth, upper.depth)
    fixed = {upper.family.shape_fields[field]: value for field, value in fields.items()}
    # A depth that is asked for by name may leave the pattern that engines have built in.
    fits = anywhere if "layer" in fixed else upper.fits
    depths: Iterable[int] = range(lower.depth, upper.depth + 1)
    if operator in _BLOCK_OPERATORS:
        depths = reachable_depths(upper.depth, block_map, kept, fits)
    elif operator == "slice":
        depths = [depth for depth in depths if _keeps_pattern(depth, upper.depth, fits)]
    elif operator == "expand" and "layer" not in fixed:
        depths = [depth for depth in depths if _keeps_pattern(lower.depth, depth, lambda i, j: lower.fits(j, i))]
    if "layer" in fixed:
        if fixed["layer"] not in depths:
            raise ValueError(
                f"{upper.family.depth_field}={fixed['layer']} cannot be made by operator={operator!r}, which replaces "
                f"whole blocks. Depths it can make: {', '.join(str(depth) for depth in depths)}. Choose one of these, "
                "or operator='slice' or 'expand'."
            )
        depths = [fixed["layer"]]
    return Grid(upper, lower.sizes, lower.depth, list(depths), fixed)


def _keeps_pattern(kept: int, total: int, fits: Fits) -> bool:
    """Whether so many of the layers can be chosen that each comes to stand where it belongs."""
    return fitting_layers(spaced_layers(total, kept), total, fits) is not None


def _nearest(options: Sequence[Candidate], wanted: float, tolerance: float) -> Candidate:
    """Within the tolerance the one of least strain, on the staircase along the line if any is; else the nearest
    size."""

    def error(option: Candidate) -> float:
        return abs(option.num_parameters - wanted) / wanted

    within = [option for option in options if error(option) <= tolerance]
    if not within:
        return min(options, key=error)
    return min(within, key=lambda option: (not option.on_stair, option.strain, error(option)))


def _fields(upper: Architecture, option: Candidate) -> dict[str, int]:
    values = {**option.sizes, "layer": option.depth, "heads": option.sizes["group"] * option.sizes["query"]}
    return {field: values[dim] for field, dim in upper.family.shape_fields.items()}


def _check_pair(upper: Architecture, lower: Architecture) -> None:
    kinds = upper.config.model_type, lower.config.model_type
    shared = {dim for dim in upper.sizes if dim not in ("width", "ffn", "group", "query")}
    different = sorted(dim for dim in shared if upper.sizes[dim] != lower.sizes.get(dim))
    if kinds[0] != kinds[1] or different or upper.tied != lower.tied:
        raise ValueError(
            f"The anchors do not belong to one chain: model types {kinds}, tied heads {(upper.tied, lower.tied)}, "
            f"different sizes of {different or 'nothing else'}. Only depth, width, FFN width and the number of heads "
            "may differ."
        )


def _check_range(upper: Architecture, lower: Architecture, fields: Mapping[str, Any]) -> None:
    upper.resolve_sizes({field: upper.shape.get(field, 1) for field in fields})
    low, high = lower.shape, upper.shape
    for field, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{field} must be a positive integer, got {value!r}.")
        if not low[field] <= value <= high[field]:
            raise ValueError(
                f"{field}={value} is outside what lies between the two anchors, {low[field]} to {high[field]}. Choose "
                "a value in that range."
            )


def _check_size_range(upper: Architecture, lower: Architecture, wanted: float, tolerance: float) -> None:
    low, high = lower.num_parameters, upper.num_parameters
    if not low * (1 - tolerance) <= wanted <= high * (1 + tolerance):
        raise ValueError(
            f"num_parameters={wanted:,.0f} is outside what lies between the two anchors, {low:,} to {high:,}. Choose "
            "a size in that range (sizes above 1 are parameter counts: 138e6 is 138M)."
        )


def _impossible(grid: Grid, fields: Mapping[str, int]) -> str:
    """Why no shape has these fields; a width that the config class refuses has its own message."""
    upper, on_line = grid.upper, {}
    if "width" in grid.fixed and "heads" not in grid.fixed and "group" not in grid.fixed:
        on_line = next(iter(heads_for_width(grid, grid.fixed["width"])), {})
    values = {**on_line, "heads": on_line["group"] * on_line["query"]} if on_line else {}
    heads = {field: values[dim] for field, dim in upper.family.shape_fields.items() if dim in values}
    try:
        target_architecture(upper, {**heads, **fields})
    except ValueError as error:
        return str(error)
    return (
        f"No shape between the two anchors has {dict(fields)}: heads come in whole key/value groups of "
        f"{upper.sizes['query']}. Widths on offer: {', '.join(str(width) for width in widths(grid))}. Choose other "
        "values or leave one of these fields out."
    )


def _too_far(
    upper: Architecture, options: Sequence[Candidate], wanted: float, tolerance: float, fields: Mapping[str, int]
) -> str:
    below = max((o for o in options if o.num_parameters <= wanted), key=lambda o: o.num_parameters, default=None)
    above = min((o for o in options if o.num_parameters > wanted), key=lambda o: o.num_parameters, default=None)
    sides = [f"{o.num_parameters:,} ({_fields(upper, o)})" for o in (below, above) if o is not None]
    given = f" with {dict(fields)}" if fields else ""
    depth = next(field for field, dim in upper.family.shape_fields.items() if dim == "layer")
    others = ""
    if upper.engine_pattern and not upper.off_pattern and depth not in fields:
        others = (
            f" Sizes have depths whose layers llama.cpp takes for what they are; others are made where config names "
            f"one ({{{depth!r}: ...}})."
        )
    return (
        f"No reachable size{given} is within tolerance={tolerance:g} of num_parameters={wanted:,.0f}. Nearest: "
        f"{' and '.join(sides)}. Ask for one of these{',' if fields else ' or'} raise "
        f"tolerance{', or leave fields of config free' if fields else ''}.{others}"
    )
