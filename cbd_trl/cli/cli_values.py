"""What is written behind a flag: counts, sizes, anchors, shapes and bridges, as text or as YAML has read it."""

import json
import re
from typing import Any

_COUNT = re.compile(r"([0-9]*\.?[0-9]+(?:e\+?[0-9]+)?)\s*([kmb]?)", re.IGNORECASE)
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}


def parse_count(text: str | float) -> float:
    """A parameter count as people write it.

    Args:
        text: a number, or text such as `138e6`, `138M`, `1.2B`.

    Returns:
        the number.

    Raises:
        ValueError: for any other text.
    """
    if isinstance(text, int | float) and not isinstance(text, bool):
        return float(text)
    match = _COUNT.fullmatch(str(text).strip().replace(",", "").replace("_", ""))
    if match is None:
        raise ValueError(f"{text!r} is no number of parameters: write 138e6, 138M or 1.2B.")
    return float(match[1]) * _UNITS[match[2].lower()]


def parse_sizes(values: list[Any] | str | float) -> list[float]:
    """The sizes of `--sizes`, or of YAML.

    Args:
        values: counts, several of them in one text with commas between.

    Returns:
        the numbers, in their order.

    Raises:
        ValueError: for what is no count.
    """
    items = values if isinstance(values, list) else [values]
    return [parse_count(part) for item in items for part in str(item).split(",") if part.strip()]


def parse_anchors(values: list[Any] | str | float | dict[str, Any] | None) -> list[dict[str, Any] | float]:
    """The anchors of `--anchors`, or of YAML.

    Args:
        values: JSON objects, counts and ratios; or one JSON list of them.

    Returns:
        what `build_chain` takes.

    Raises:
        ValueError: if there are none, or one is neither an object nor a number.
    """
    items = values if isinstance(values, list) else [] if values is None else [values]
    if len(items) == 1 and isinstance(items[0], str) and items[0].lstrip().startswith("["):
        items = _json(items[0], "--anchors")
    if not items:
        raise ValueError(
            "--anchors is missing: name at least one lower anchor, such as --anchors 85M 44M, or --anchors "
            "'[{\"num_hidden_layers\": 16}]'."
        )
    return [_parse_anchor(item) for item in items]


def _parse_anchor(item: Any) -> dict[str, Any] | float:
    if isinstance(item, str) and item.lstrip().startswith("{"):
        item = _json(item, "--anchors")
    if isinstance(item, dict):
        return item
    try:
        return parse_count(item)
    except ValueError as error:
        raise ValueError(
            f"--anchors: {item!r} is neither config fields nor a size. Write '{{\"num_hidden_layers\": 16}}', 85e6, "
            "85M, or a ratio such as 0.6."
        ) from error


def parse_shape(value: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """The config fields of `--shape`, or of YAML.

    Args:
        value: a JSON object, a mapping, or None.

    Raises:
        ValueError: for anything else.
    """
    shape = _json(value, "--shape") if isinstance(value, str) else value
    if shape is not None and not isinstance(shape, dict):
        raise ValueError(
            f"--shape: {value!r} is not an object of config fields such as '{{\"num_hidden_layers\": 20}}'."
        )
    return shape


def parse_bridge(value: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """What `--bridge`, or YAML, says.

    Args:
        value: a JSON object, a mapping, or None.

    Returns:
        `model`, and `args` and `dataset` where they are given.

    Raises:
        ValueError: for anything else.
    """
    bridge = _json(value, "--bridge") if isinstance(value, str) else value
    if bridge is None:
        return None
    if not isinstance(bridge, dict) or "model" not in bridge or bridge.keys() - {"model", "args", "dataset"}:
        raise ValueError(
            f"--bridge: {value!r} is not an object with a `model`, and `args` and `dataset` where they are wanted. "
            'Write \'{"model": "DIR", "args": {"max_steps": 4000}}\'.'
        )
    return bridge


def _json(text: str, flag: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{flag}: {text!r} is not JSON ({error}). Field names stand in double quotes, the whole in single ones: "
            "'{\"num_hidden_layers\": 16}'."
        ) from error
