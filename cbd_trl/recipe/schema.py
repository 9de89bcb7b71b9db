"""What a recipe says: a whole chain as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Place:
    """A model, wherever it is.

    Args:
        name: a folder or a Hub id.
        revision: of a Hub id.
    """

    name: str
    revision: str | None = None


@dataclass(frozen=True)
class DataPart:
    """One dataset of a mix.

    Args:
        name: a .jsonl, .json, .csv, .parquet or .txt file, a Hub id, or `demo`, the text that the package ships.
        config: configuration of a dataset on the Hub.
        split: which of its splits, or a slice of one, such as `train[:90%]`; of `demo` "train" or "held_out".
        column: the column that holds the text; None for rows in a format of SFTTrainer.
        share: of the rows of the mix, to scale.
        where: where the recipe says so, such as "data[0]".
    """

    name: str
    config: str | None = None
    split: str = "train"
    column: str | None = None
    share: float = 1.0
    where: str = "data"


@dataclass(frozen=True)
class AnchorPart:
    """One lower anchor.

    Args:
        what: config fields, a parameter count or a ratio, as `build_chain` takes them.
        args: fields of `DistillConfig` that are its own.
        data: of its own; empty for the recipe's.
    """

    what: Mapping[str, Any] | float
    args: Mapping[str, Any] = field(default_factory=dict)
    data: tuple[DataPart, ...] = ()


@dataclass(frozen=True)
class BridgePart:
    """What a source of another tokenizer teaches first.

    Args:
        model: anchor zero, before it is trained.
        args: fields of `BridgeDistillConfig` that are its own.
        data: of its own; empty for the recipe's.
    """

    model: str
    args: Mapping[str, Any] = field(default_factory=dict)
    data: tuple[DataPart, ...] = ()


@dataclass(frozen=True)
class EvaluationPart:
    """What the finished chain is measured on.

    Args:
        data: text that nothing was trained on.
        sizes: parameter counts of targets to measure beside the anchors.
        tokens: the most tokens.
        length: tokens in a block.
    """

    data: tuple[DataPart, ...]
    sizes: tuple[float, ...] = ()
    tokens: int = 8192
    length: int = 256


@dataclass(frozen=True)
class Recipe:
    """A whole chain, as one file says it. Where something is missing or wrong, `problems` says so.

    Args:
        name: of the file.
        source: the model at the head.
        data: what is trained on.
        anchors: the lower ones, largest first.
        output_dir: the chain's folder.
        bridge: None for a source that anchors can be cut from.
        evaluation: None for no measurement.
        args: fields of `DistillConfig`, for every anchor.
        calibration_tokens: tokens behind the statistics.
        problems: what is wrong with the file itself, each with its place in it.
        lines: of the places in the file.
    """

    name: str
    source: Place | None
    data: tuple[DataPart, ...]
    anchors: tuple[AnchorPart, ...]
    output_dir: str
    bridge: BridgePart | None = None
    evaluation: EvaluationPart | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    calibration_tokens: int = 8192
    problems: tuple[str, ...] = ()
    lines: Mapping[str, int] = field(default_factory=dict)
