"""What a chain's records say of where it comes from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from cbd_trl.cards.card import plain
from cbd_trl.cards.origin import Origin, hub_ids, read_origins
from cbd_trl.chain.manifest import Anchor, weight_files

# Under these names in an anchor's `training`.
ORIGINS = "origins"
DATASETS = "datasets"
# Beside the arguments of a training: names of those that were not at their default, and whose defaults the others are.
GIVEN, VERSIONS = "given", "versions"


class AnyChain(Protocol):
    """What cards read of a `Chain`, which itself writes cards."""

    path: Path
    name_or_path: str
    revision: str | None
    model_type: str
    versions: dict[str, str]
    anchors: list[Anchor]


def hub_id(chain: AnyChain) -> str | None:
    """The Hub id of a chain that was opened by one; None for a folder."""
    return None if chain.revision is None else chain.name_or_path


def chain_label(chain: AnyChain) -> str:
    """What to call a chain in front of a reader: its Hub id, or the name of its folder, never a path."""
    return hub_id(chain) or chain.path.resolve().name


def chain_name(chain: AnyChain) -> str:
    """The same as text of a card."""
    return plain(chain_label(chain))


def chain_origins(chain: AnyChain) -> tuple[Origin, ...]:
    """The models that a chain was made from, each once."""
    return tuple(dict.fromkeys(origin for anchor in chain.anchors for origin in _own(anchor)))


def anchor_origins(chain: AnyChain, anchor: Anchor) -> tuple[Origin, ...]:
    """The models that an anchor was made from: its own, or those of the nearest anchor above that has some."""
    above = chain.anchors[: [other.name for other in chain.anchors].index(anchor.name) + 1]
    return next((found for other in reversed(above) if (found := _own(other))), ())


def anchor_datasets(anchor: Anchor) -> tuple[str, ...]:
    """The Hub ids of what an anchor was trained on, as far as they are known."""
    names = anchor.training.get(DATASETS)
    return hub_ids(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()


def chain_datasets(anchors: Sequence[Anchor]) -> tuple[str, ...]:
    """Those of several anchors."""
    return hub_ids(name for anchor in anchors for name in anchor_datasets(anchor))


def weight_hashes(anchor: Anchor) -> Mapping[str, str]:
    """File -> sha256 of the files that hold an anchor's weights."""
    return {name: anchor.files[name] for name in weight_files(anchor.files)}


def _own(anchor: Anchor) -> tuple[Origin, ...]:
    return read_origins(anchor.training.get(ORIGINS))
