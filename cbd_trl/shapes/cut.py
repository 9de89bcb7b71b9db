"""Cut an architecture to the shape of some config fields, or explain which shapes it can be cut to."""

from collections.abc import Mapping
from typing import Any

from cbd_trl.architectures import Architecture
from cbd_trl.surgery.blocks import spaced_layers


def cut_architecture(upper: Architecture, fields: Mapping[str, Any]) -> Architecture:
    """Cut an architecture to these config fields; those left out stay as they are in `upper`.

    Args:
        upper: the architecture to cut from; its config's per-layer lists travel with the evenly spaced layers that
            are kept, those that engines tell apart by position (`Architecture.fits`) where they belong if that can be.
        fields: config fields of the family (`Architecture.shape` lists them) with their values.

    Raises:
        ValueError: a field is not a shape field, its value is not a positive integer or is larger than in `upper`, or
            transformers does not take the shape, or no layer with attention is kept.
    """
    depth, sizes = upper.resolve_sizes(fields)
    _check_not_larger(upper, depth, sizes, fields)
    target = upper.with_layers(spaced_layers(upper.depth, depth, upper.fits)).resized(**sizes)
    error = _config_error(target)
    if error is not None:
        raise ValueError(_width_error(target, error))
    if not any(site.axis[0] == "group" for site in target.sites):
        raise ValueError(
            f"None of the {target.depth} layers of this {target.config.model_type} would have attention, and "
            "transformers cannot run a cache without such a layer. Keep more layers."
        )
    return target


def width_follows_heads(architecture: Architecture) -> bool:
    """Check whether the family fixes width = heads x head size (GPT-2), so that width and heads are one choice."""
    sizes = architecture.sizes
    resolved = architecture.family.resolve(sizes, {"heads": 2 * sizes["group"] * sizes["query"]})
    return resolved["width"] != sizes["width"]


def needs_width_multiple_of_heads(architecture: Architecture) -> bool:
    """Check whether transformers takes only widths that are multiples of the number of heads (as of Llama)."""
    if width_follows_heads(architecture):
        return True
    heads = 2 * architecture.sizes["query"]
    probe = architecture.resized(group=2, width=heads * architecture.sizes["dim"] + 1)
    return heads > 1 and _config_error(probe) is not None


def _check_not_larger(upper: Architecture, depth: int, sizes: Mapping[str, int], fields: Mapping[str, Any]) -> None:
    shape = upper.shape
    for field, value in fields.items():
        if value > shape[field]:
            raise ValueError(
                f"{field}={value} is larger than the {shape[field]} of the model it is cut from. Give at most "
                f"{shape[field]}, or put a larger anchor above."
            )
    wanted, had = {**sizes, "layer": depth}, {**upper.sizes, "layer": upper.depth}
    for dim, value in wanted.items():
        if value > had[dim]:
            what = {"query": "query heads per key/value head"}.get(dim, dim)
            raise ValueError(
                f"The shape {dict(fields)} means {value} {what}, more than the {had[dim]} of the model it is cut "
                f"from. Cutting only removes: keep every dimension of {shape} or make it smaller."
            )


def _config_error(architecture: Architecture) -> str | None:
    """Get transformers' own error for this shape, None if there is none."""
    # The subclass check alone: validate() would also fail for fields that have nothing to do with the shape.
    validate = getattr(architecture.config, "validate_architecture", None)
    try:
        if validate is not None:
            validate()
    except ValueError as error:
        return str(error)
    return None


def _width_error(target: Architecture, error: str) -> str:
    """Word the error for a width that the config class does not take, with the nearest widths it takes."""
    width, heads = target.sizes["width"], target.sizes["group"] * target.sizes["query"]
    nearest = [value for value in (width // heads * heads, -(-width // heads) * heads) if value > 0]
    return (
        f"transformers refuses to save or load a {target.config.model_type} config of width {width} with {heads} "
        f"heads: {error} "
        f"Nearest widths for {heads} heads: {' and '.join(str(value) for value in nearest)}; or choose another number "
        "of heads."
    )
