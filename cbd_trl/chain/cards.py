"""The cards of a chain and of its anchors."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import hf_hub_download
from transformers.utils import logging

from cbd_trl.architectures.registry import describe_shape
from cbd_trl.cards.card import PICTURE, Card, code, plain, recorded_losses, save_card, table
from cbd_trl.cards.metadata import card_metadata, license_sentence
from cbd_trl.cards.origin import Origin, hub_ids, read_origins
from cbd_trl.chain.anchor import Anchor
from cbd_trl.chain.manifest import weight_files
from cbd_trl.chain.measurements import MEASURED, markdown_table, measures
from cbd_trl.shapes.smaller import target_architecture
from cbd_trl.shapes.solve import solve_target

logger = logging.get_logger(__name__)


# Under these names in an anchor's `training`.
ORIGINS = "origins"
DATASETS = "datasets"
# Under these in its "arguments": all values, names of those that were not at their default, and the libraries whose
# defaults the others are.
VALUES, NON_DEFAULT, VERSIONS = "values", "non_default", "versions"


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


_USE = """from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({place})
tokenizer = AutoTokenizer.from_pretrained({place})"""


def anchor_card(chain: AnyChain, anchor: Anchor, repo_id: str | None = None) -> str:
    """The card of an anchor.

    Args:
        chain: that it is of.
        anchor: one of its anchors.
        repo_id: of a repository on the Hub of the anchor's own; None where it lies in the chain's.

    Returns:
        the text of its README.md.

    Raises:
        ValueError: the metadata are nothing that the Hub takes.
    """
    origins, name = anchor_origins(chain, anchor), chain_name(chain)
    trained = anchor.tokens_seen > 0
    data = card_metadata(
        origins,
        name=anchor.name,
        datasets=anchor_datasets(anchor),
        tags=["trl"] if trained else [],
    )
    card = Card(
        title=f"{anchor.name}, an anchor of {name}",
        summary=f"A stock transformers model ({plain(chain.model_type)}), one of the models from which "
        f"[cbd_trl](https://arxiv.org/abs/2605.07783) makes others of any size between them. {_how(anchor)}",
        facts=dict(_facts(anchor)),
        use=_USE.format(place=f'"{repo_id}"' if repo_id else f'"{name}", subfolder="{anchor.name}"'),
        license=license_sentence(origins),
        sections=list(_training(anchor)),
        picture=(anchor.path / PICTURE).is_file(),
    )
    return card.text(data)


def how_made(anchor: Anchor) -> str:
    """What an anchor was made from and how, in a few words."""
    training = anchor.training
    if anchor.parent is not None and "aligned" not in training:
        return f"cut from {anchor.parent}, refitted and distilled from it"
    if "aligned" in training:
        return "a model that existed already" + (", in coordinates of the chain" if training["aligned"] else "")
    taught = "taught by the source across vocabularies" if "bridge" in training else "the source"
    return f"{taught}, its channels sorted or turned"


def _how(anchor: Anchor) -> str:
    how = how_made(anchor)
    same = "" if anchor.tokens_seen else " What it computes is unchanged."
    return f"It is {how}.{same}"


def _facts(anchor: Anchor) -> Iterator[tuple[str, str]]:
    yield "parameters", f"{anchor.num_parameters:,} ({anchor.dtype})"
    yield "shape", plain(describe_shape(anchor.shape))
    yield "made by", how_made(anchor)
    if anchor.parent is not None:
        yield "layers of the parent that were kept", code(anchor.kept_layers)
    if limit := anchor.architecture().engine_limit():
        yield "outside of transformers", plain(limit)
    yield "tokens seen here", f"{anchor.tokens_seen:,}"
    if anchor.tokens_seen:
        yield "data", ", ".join(map(code, anchor_datasets(anchor))) or "not named"
    for file, digest in weight_hashes(anchor).items():
        yield f"sha256 of {code(file)}", code(digest)


def _training(anchor: Anchor) -> Iterator[str]:
    if losses := recorded_losses(anchor.losses):
        yield f"## Losses at the end of the training\n\n{losses}"
    if arguments := _arguments(anchor.training):
        rows = [[code(name), code(value)] for name, value in arguments.items()]
        summary = "<details><summary>what decided the result</summary>"
        yield (
            f"## Parameters\n\n{summary}\n\n{table(['argument', 'value'], rows)}\n\n"
            f"{_defaults(anchor.training)}</details>"
        )


def _arguments(training: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a training that were not at their default; of a matched model how well it matched."""
    if "aligned" in training:
        match = training.get("match")
        return {f"match of {what}": quality for what, quality in match.items()} if isinstance(match, Mapping) else {}
    record = _record(training)
    values, names = record.get(VALUES), record.get(NON_DEFAULT)
    if not isinstance(values, Mapping) or not isinstance(names, list):
        return {}
    return {name: values[name] for name in names if isinstance(name, str) and name in values}


def _defaults(training: Mapping[str, Any]) -> str:
    """Whose defaults the other arguments have."""
    versions = _record(training).get(VERSIONS)
    if not isinstance(versions, Mapping):
        return ""
    libraries = ", ".join(f"{plain(str(name))} {plain(str(version))}" for name, version in versions.items())
    return f"All others are the defaults of {libraries}.\n\n"


def _record(training: Mapping[str, Any]) -> Mapping[str, Any]:
    bridge = training.get("bridge")
    record = (bridge if isinstance(bridge, Mapping) else training).get("arguments")
    return record if isinstance(record, Mapping) else {}


def save_cards(chain: AnyChain) -> None:
    """Write the cards of a chain in a folder and of its anchors there. A chain is whole without them: where they
    cannot be written there is a warning.

    Args:
        chain: the chain. A picture and measurements that an earlier `save_measurements` left in its folder are shown.
    """
    try:
        for anchor in (anchor for anchor in chain.anchors if anchor.repo is None):
            copy_picture(chain, anchor.path)
            save_card(anchor.path, anchor_card(chain, anchor))
        save_card(chain.path, chain_card(chain))
    except OSError as error:
        logger.warning(
            f"The cards of the chain in {chain.path} were not written ({error}); the chain itself is whole."
        )


def copy_picture(chain: AnyChain, folder: Path) -> None:
    """Put the picture of a chain, if there is one, beside a card of what was made from it."""
    picture = chain.path / PICTURE
    if chain.revision is not None and not picture.is_file():
        # Into the folder of this commit in the Hub's cache; a model is whole without it, whatever goes wrong.
        with suppress(Exception):
            hf_hub_download(chain.name_or_path, PICTURE, revision=chain.revision)
    if picture.is_file():
        shutil.copyfile(picture, folder / PICTURE)


_CHAIN_USE = """from cbd_trl import Chain, from_chain
model = from_chain("{name}", num_parameters={size:_})
tokenizer = Chain.from_pretrained("{name}").tokenizer()"""


def chain_card(chain: AnyChain, repo_id: str | None = None) -> str:
    """The card of a chain.

    Args:
        chain: the chain. Where what was measured of it and the picture lie in its folder (see `save_cards`), the card
            shows them.
        repo_id: where it is going to be on the Hub; None for where it is.

    Returns:
        the text of its README.md.

    Raises:
        ValueError: the metadata are nothing that the Hub takes.
    """
    name, origins = repo_id or chain_name(chain), chain_origins(chain)
    trained = any(anchor.tokens_seen for anchor in chain.anchors)
    data = card_metadata(
        origins,
        # The root of the repository holds no model that transformers could load.
        library="cbd_trl",
        name=name.split("/")[-1],
        datasets=chain_datasets(chain.anchors),
        tags=["chain", *(["trl"] if trained else [])],
    )
    largest, smallest = chain.anchors[0].num_parameters, chain.anchors[-1].num_parameters
    versions = ", ".join(f"{name} {version}" for name, version in chain.versions.items() if version[:1].isdigit())
    card = Card(
        title=name,
        summary=f"A chain of {len(chain.anchors)} language models, its anchors, from which "
        "[cbd_trl](https://arxiv.org/abs/2605.07783) makes a stock transformers model of any size between "
        f"{smallest:,} and {largest:,} parameters: in seconds, without a teacher and without training.",
        facts={
            "family": plain(chain.model_type),
            "made from": ", ".join(code(origin.label) for origin in origins) or "not known",
            "data": ", ".join(map(code, chain_datasets(chain.anchors))) or "not named",
            "made with": plain(versions),
        },
        use=_CHAIN_USE.format(name=name, size=_example(chain.anchors)),
        license=license_sentence(origins),
        sections=[f"## Anchors\n\n{_anchors_table(chain.anchors)}", *_measured(chain)],
        picture=(chain.path / PICTURE).is_file(),
    )
    return card.text(data)


def _example(anchors: list[Anchor]) -> int:
    """A size that can be made: in the middle between the two largest anchors, as people say it, where one is near."""
    if len(anchors) < 2:
        return anchors[0].num_parameters
    upper, lower, blocks = anchors[0].architecture(), anchors[1].architecture(), anchors[1].block_map or []
    kept = anchors[1].kept_layers
    middle = round(float(f"{(upper.num_parameters + lower.num_parameters) / 2:.3g}"))
    with suppress(ValueError):
        solve_target(upper, lower, blocks, middle, kept=kept)
        return middle
    fields = solve_target(upper, lower, blocks, middle, tolerance=1.0, kept=kept)
    return target_architecture(upper, fields).num_parameters


def _anchors_table(anchors: list[Anchor]) -> str:
    header = ["anchor", "parameters", "shape", "made by", "tokens seen", "cross-entropy", "its teacher's", "sha256"]
    rows = []
    for anchor in anchors:
        losses = [f"{anchor.losses[name]:.4g}" if name in anchor.losses else "" for name in ("ce", "teacher_ce")]
        digests = ", ".join(code(digest[:16]) for digest in weight_hashes(anchor).values())
        shape = plain(describe_shape(anchor.shape))
        made = [how_made(anchor), f"{anchor.tokens_seen:,}"]
        rows.append([anchor.name, f"{anchor.num_parameters:,}", shape, *made, *losses, digests])
    note = (
        "Cross-entropies are of the training text, nats per token, at its end; sha256 is how that of the weights "
        "begins."
    )
    return f"{table(header, rows)}\n\n{note}"


def _measured(chain: AnyChain) -> Iterator[str]:
    """A table of what was measured, where something was."""
    # A file that is not a report, or of another version, must not cost the card.
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError):
        report = _plain(json.loads((chain.path / MEASURED).read_text(encoding="utf-8")))
        yield f"## Measured\n\n{measures(report)}.\n\n{markdown_table(report)}"


def _plain(value: Any) -> Any:
    """A report whose names may stand in a table."""
    if isinstance(value, dict):
        return {plain(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return plain(value) if isinstance(value, str) else value
