"""Write the cards of a chain and of its anchors."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import hf_hub_download
from transformers.utils import logging

from cbd_trl.architectures.registry import describe_shape
from cbd_trl.cards.card import PICTURE, code, evaluation_prefix, losses_table, plain, render_card, save_card
from cbd_trl.cards.metadata import card_metadata, license_sentence
from cbd_trl.cards.origin import Origin, hub_ids, read_origins
from cbd_trl.chain.anchor import Anchor
from cbd_trl.chain.manifest import ALIGNED, CONSOLIDATION, OBSTACLE, PUBLIC_MODEL, weight_files
from cbd_trl.chain.measurements import MEASURED, measurements_table, table_units
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.shapes.solve import solve_target
from cbd_trl.utils.formatting import markdown_table, with_active

logger = logging.get_logger(__name__)

# Keys of an anchor's `training`: the models it was made from, and what it was trained on.
ORIGINS = "origins"
DATASETS = "datasets"
# Keys of its "arguments": all values, names of those that were set, and the libraries whose defaults the rest are.
VALUES, NON_DEFAULT, VERSIONS = "values", "non_default", "versions"

_CHAIN_USE = """from cbd_trl import Chain, from_chain
model = from_chain("{name}", num_parameters={size:_})
tokenizer = Chain.from_pretrained("{name}").tokenizer()"""
_ANCHOR_USE = """from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({place})
tokenizer = AutoTokenizer.from_pretrained({place})"""


class AnyChain(Protocol):
    """The fields of a `Chain` that cards read; `Chain` itself imports this module."""

    path: Path
    name_or_path: str
    revision: str | None
    model_type: str
    versions: dict[str, str]
    anchors: list[Anchor]


def save_cards(chain: AnyChain) -> None:
    """Write the cards of a chain in a folder and of its anchors there; warn where they cannot be written.

    Args:
        chain: the chain. A chart and measurements that an earlier `save_measurements` left in its folder are shown.
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
    """Copy the chart of a chain, if it has one, beside the card of a model made from it."""
    picture = chain.path / PICTURE
    if chain.revision is not None and not picture.is_file():
        # Into the folder of this commit in the Hub's cache; the model is whole without it, whatever goes wrong.
        with suppress(Exception):
            hf_hub_download(chain.name_or_path, PICTURE, revision=chain.revision)
    if picture.is_file():
        shutil.copyfile(picture, folder / PICTURE)


def chain_card(chain: AnyChain, repo_id: str | None = None) -> str:
    """Render the card of a chain.

    Args:
        chain: the chain. Measurements and a chart in its folder are shown (see `save_cards`).
        repo_id: the repository on the Hub that it is pushed to; None for where it is.

    Returns:
        the text of its README.md.
    """
    name, origins = repo_id or chain_name(chain), chain_origins(chain)
    trained = any(anchor.tokens_seen for anchor in chain.anchors)
    data = card_metadata(
        origins,
        # The root of the repository holds no model that transformers could load.
        library="cbd_trl",
        name=name.split("/")[-1],
        datasets=_datasets(*chain.anchors),
        tags=["chain", *(["trl"] if trained else [])],
    )
    largest, smallest = chain.anchors[0].num_parameters, chain.anchors[-1].num_parameters
    versions = ", ".join(f"{name} {version}" for name, version in chain.versions.items() if version[:1].isdigit())
    return render_card(
        data,
        title=name,
        summary=f"A chain of {len(chain.anchors)} language models, its anchors, from which "
        "[cbd_trl](https://arxiv.org/abs/2605.07783) makes a stock transformers model of any size between "
        f"{smallest:,} and {largest:,} parameters: in seconds, without a teacher and without training.",
        facts={
            "family": plain(chain.model_type),
            "made from": ", ".join(code(origin.label) for origin in origins) or "not known",
            "data": ", ".join(map(code, _datasets(*chain.anchors))) or "not named",
            "made with": plain(versions),
        },
        use=_CHAIN_USE.format(name=name, size=_example_size(chain.anchors)),
        license=license_sentence(origins),
        sections=[f"## Anchors\n\n{_anchors_table(chain.anchors)}", *_measured(chain)],
        picture=(chain.path / PICTURE).is_file(),
    )


def anchor_card(chain: AnyChain, anchor: Anchor, repo_id: str | None = None) -> str:
    """Render the card of an anchor.

    Args:
        chain: that it belongs to.
        anchor: one of its anchors.
        repo_id: of a repository on the Hub of the anchor's own; None where it lies in the chain's.

    Returns:
        the text of its README.md.
    """
    origins, name = _anchor_origins(chain, anchor), chain_name(chain)
    data = card_metadata(
        origins,
        name=anchor.name,
        datasets=_datasets(anchor),
        tags=["trl"] if anchor.tokens_seen else [],
    )
    unchanged = "" if anchor.tokens_seen else " What it computes is unchanged."
    return render_card(
        data,
        title=f"{anchor.name}, an anchor of {name}",
        summary=f"A stock transformers model ({plain(chain.model_type)}), one of the models from which "
        "[cbd_trl](https://arxiv.org/abs/2605.07783) makes others of any size between them. "
        f"It is {_provenance(anchor)}.{unchanged}",
        facts=dict(_anchor_facts(anchor)),
        use=_ANCHOR_USE.format(place=f'"{repo_id}"' if repo_id else f'"{name}", subfolder="{anchor.name}"'),
        license=license_sentence(origins),
        sections=list(_training_sections(anchor)),
        picture=(anchor.path / PICTURE).is_file(),
    )


def hub_id(chain: AnyChain) -> str | None:
    """Return the Hub id of a chain that was opened by one; None for a folder."""
    return None if chain.revision is None else chain.name_or_path


def chain_label(chain: AnyChain) -> str:
    """Name a chain for a reader: its Hub id, or the name of its folder, never a path."""
    return hub_id(chain) or chain.path.resolve().name


def chain_name(chain: AnyChain) -> str:
    """Name a chain as escaped text of a card."""
    return plain(chain_label(chain))


def chain_origins(chain: AnyChain) -> tuple[Origin, ...]:
    """Return the models that a chain was made from, each once."""
    return tuple(dict.fromkeys(origin for anchor in chain.anchors for origin in _recorded_origins(anchor)))


def weight_hashes(anchor: Anchor) -> Mapping[str, str]:
    """Return file -> sha256 of the files that hold an anchor's weights."""
    return {name: anchor.files[name] for name in weight_files(anchor.files)}


def _anchor_origins(chain: AnyChain, anchor: Anchor) -> tuple[Origin, ...]:
    """The models that an anchor was made from: its own, or those of the nearest anchor above that has some; of one
    that was distilled beside, or from, a model that existed already, that one too."""
    found: tuple[Origin, ...] = ()
    for other in reversed(chain.anchors[: [other.name for other in chain.anchors].index(anchor.name) + 1]):
        own = _recorded_origins(other)
        found = (*own, *found)
        if own and PUBLIC_MODEL not in other.training:
            break
    return tuple(dict.fromkeys(found))


def _recorded_origins(anchor: Anchor) -> tuple[Origin, ...]:
    return read_origins(anchor.training.get(ORIGINS))


def _datasets(*anchors: Anchor) -> tuple[str, ...]:
    """The Hub ids of what anchors were trained on, as far as they are known."""
    runs = [(anchor.training, *anchor.training.get(CONSOLIDATION, [])) for anchor in anchors]
    recorded = [record.get(DATASETS) for records in runs for record in records]
    lists = [names for names in recorded if isinstance(names, list)]
    return hub_ids(name for names in lists for name in names if isinstance(name, str))


def _example_size(anchors: Sequence[Anchor]) -> int:
    """A size that can be made: halfway between the two largest anchors, rounded where that is possible."""
    if len(anchors) < 2:
        return anchors[0].num_parameters
    upper, lower, blocks = anchors[0].architecture(), anchors[1].architecture(), anchors[1].block_map or []
    kept = anchors[1].kept_layers
    middle = round(float(f"{(upper.num_parameters + lower.num_parameters) / 2:.3g}"))
    with suppress(ValueError):
        solve_target(upper, lower, blocks, middle, kept=kept)
        return middle
    fields = solve_target(upper, lower, blocks, middle, tolerance=1.0, kept=kept)
    return cut_architecture(upper, fields).num_parameters


def _anchors_table(anchors: Sequence[Anchor]) -> str:
    header = ["anchor", "parameters", "shape", "made by", "tokens seen", "cross-entropy", "its teacher's", "sha256"]
    rows = []
    for anchor in anchors:
        losses = [f"{anchor.losses[name]:.4g}" if name in anchor.losses else "" for name in ("ce", "teacher_ce")]
        hashes = ", ".join(code(digest[:16]) for digest in weight_hashes(anchor).values())
        shape = plain(describe_shape(anchor.shape))
        made = [_provenance(anchor), f"{anchor.tokens_seen:,}"]
        rows.append([anchor.name, _parameters(anchor), shape, *made, *losses, hashes])
    note = (
        "Cross-entropies are of the training text, nats per token, at its end; sha256 is how that of the weights "
        "begins."
    )
    return f"{markdown_table(header, rows)}\n\n{note}"


def _measured(chain: AnyChain) -> Iterator[str]:
    """The section with the measurements of a chain, where it has some."""
    # A file that is not a report, or is one of another version, leaves the card without the section.
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError):
        report = _escaped(json.loads((chain.path / MEASURED).read_text(encoding="utf-8")))
        yield f"## Measured\n\n{table_units(report)}.\n\n{measurements_table(report)}"


def _escaped(value: Any) -> Any:
    """A report whose names are harmless."""
    if isinstance(value, dict):
        return {plain(key): _escaped(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_escaped(entry) for entry in value]
    return plain(value) if isinstance(value, str) else value


def _parameters(anchor: Anchor) -> str:
    """The number of parameters, and of a mixture of experts of those that a token is computed with."""
    total, active = anchor.num_parameters, anchor.architecture().num_active_parameters
    return with_active(f"{total:,}", total, active)


def _provenance(anchor: Anchor) -> str:
    """What an anchor was made from and how, in a few words."""
    together = ", then consolidated with the other anchors" if anchor.training.get(CONSOLIDATION) else ""
    return f"{_first_provenance(anchor)}{together}"


def _first_provenance(anchor: Anchor) -> str:
    training = anchor.training
    if isinstance(record := training.get(PUBLIC_MODEL), Mapping):
        # Of a folder the name has the hash of its weights.
        model = code(str(record.get("model") or "").partition("@")[0] or "a model made in memory")
        if record.get(OBSTACLE) is None:
            return f"{model}, put into the coordinates of {anchor.parent} and distilled from it and from what it was"
        return f"cut from {anchor.parent}, refitted, taught by it and by {model}"
    if anchor.parent is not None and ALIGNED not in training:
        return f"cut from {anchor.parent}, refitted and distilled from it"
    if ALIGNED in training:
        return "a model that existed already" + (", in coordinates of the chain" if training[ALIGNED] else "")
    taught = "taught by the source across vocabularies" if "bridge" in training else "the source"
    return f"{taught}, its channels sorted or turned"


def _anchor_facts(anchor: Anchor) -> Iterator[tuple[str, str]]:
    yield "parameters", f"{_parameters(anchor)} ({anchor.dtype})"
    yield "shape", plain(describe_shape(anchor.shape))
    yield "made by", _provenance(anchor)
    if anchor.parent is not None:
        yield (
            f"layers of the parent that {'its own are paired with' if anchor.apart else 'were kept'}",
            code(anchor.kept_layers),
        )
    if limit := anchor.architecture().engine_limit():
        yield "outside of transformers", plain(limit)
    yield "tokens seen here", f"{anchor.tokens_seen:,}"
    if anchor.tokens_seen:
        yield "data", ", ".join(map(code, _datasets(anchor))) or "not named"
    for file, digest in weight_hashes(anchor).items():
        yield f"sha256 of {code(file)}", code(digest)


def _training_sections(anchor: Anchor) -> Iterator[str]:
    prefixes = [prefix for key in anchor.losses if (prefix := evaluation_prefix(key)) is not None]
    titles = {prefix: plain(prefix.strip("_") or "training") for prefix in prefixes}
    if losses := losses_table({prefix: (title, anchor.losses) for prefix, title in titles.items()}):
        yield f"## Losses at the end of the training\n\n{losses}"
    if arguments := _arguments(anchor.training):
        rows = [[code(name), code(value)] for name, value in arguments.items()]
        summary = "<details><summary>what decided the result</summary>"
        yield (
            f"## Parameters\n\n{summary}\n\n{markdown_table(['argument', 'value'], rows)}\n\n"
            f"{_defaults(anchor.training)}</details>"
        )


def _arguments(training: Mapping[str, Any]) -> dict[str, Any]:
    """How well a matched model matched, and the arguments of a training that were set."""
    match = training.get("match")
    found = {f"match of {what}": quality for what, quality in match.items()} if isinstance(match, Mapping) else {}
    record = _argument_record(training)
    values, names = record.get(VALUES), record.get(NON_DEFAULT)
    if not isinstance(values, Mapping) or not isinstance(names, list):
        return found
    return {**found, **{name: values[name] for name in names if isinstance(name, str) and name in values}}


def _defaults(training: Mapping[str, Any]) -> str:
    """Which libraries' defaults the other arguments have."""
    versions = _argument_record(training).get(VERSIONS)
    if not isinstance(versions, Mapping):
        return ""
    libraries = ", ".join(f"{plain(name)} {plain(version)}" for name, version in versions.items())
    return f"All others are the defaults of {libraries}.\n\n"


def _argument_record(training: Mapping[str, Any]) -> Mapping[str, Any]:
    bridge = training.get("bridge")
    record = (bridge if isinstance(bridge, Mapping) else training).get("arguments")
    return record if isinstance(record, Mapping) else {}
