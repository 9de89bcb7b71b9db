"""The card of an anchor."""

from collections.abc import Iterator, Mapping
from typing import Any

from cbd_trl.cards.card import PICTURE, Card, code, plain, table
from cbd_trl.cards.losses import recorded_losses
from cbd_trl.cards.metadata import card_metadata, license_sentence
from cbd_trl.chain.history import (
    GIVEN,
    VERSIONS,
    AnyChain,
    anchor_datasets,
    anchor_origins,
    chain_name,
    weight_hashes,
)
from cbd_trl.chain.manifest import Anchor
from cbd_trl.report.tables import describe_shape

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
    told = anchor.training
    if anchor.parent is not None and "aligned" not in told:
        return f"cut from {anchor.parent}, refitted and distilled from it"
    if "aligned" in told:
        return "a model that existed already" + (", in coordinates of the chain" if told["aligned"] else "")
    taught = "taught by the source across vocabularies" if "bridge" in told else "the source"
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


def _arguments(told: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a training that were not at their default; of a matched model how well it matched."""
    if "aligned" in told:
        match = told.get("match")
        return {f"match of {what}": quality for what, quality in match.items()} if isinstance(match, Mapping) else {}
    record = _record(told)
    given = record.get(GIVEN)
    return {name: record[name] for name in given if name in record} if isinstance(given, list) else {}


def _defaults(told: Mapping[str, Any]) -> str:
    """Whose defaults the other arguments have."""
    versions = _record(told).get(VERSIONS)
    if not isinstance(versions, Mapping):
        return ""
    libraries = ", ".join(f"{plain(str(name))} {plain(str(version))}" for name, version in versions.items())
    return f"All others are the defaults of {libraries}.\n\n"


def _record(told: Mapping[str, Any]) -> Mapping[str, Any]:
    bridge = told.get("bridge")
    record = bridge.get("arguments") if isinstance(bridge, Mapping) else told
    return record if isinstance(record, Mapping) else {}
