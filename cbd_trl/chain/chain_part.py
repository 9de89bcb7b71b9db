"""The card of a chain."""

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from cbd_trl.cards.card import PICTURE, Card, code, plain, table
from cbd_trl.cards.metadata import card_metadata, license_sentence
from cbd_trl.chain.cards import how_made
from cbd_trl.chain.history import AnyChain, chain_datasets, chain_name, chain_origins, weight_hashes
from cbd_trl.chain.manifest import Anchor
from cbd_trl.report.tables import describe_shape, markdown_table, measures
from cbd_trl.shapes.smaller import target_architecture
from cbd_trl.shapes.solve import solve_target

# What a sweep measured, beside the chain.
MEASURED = "loss-against-size.json"
_USE = """from cbd_trl import Chain, from_chain
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
        use=_USE.format(name=name, size=_example(chain.anchors)),
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
    said = (
        "Cross-entropies are of the training text, nats per token, at its end; sha256 is how that of the weights "
        "begins."
    )
    return f"{table(header, rows)}\n\n{said}"


def _measured(chain: AnyChain) -> Iterator[str]:
    """A table of what was measured, where something was."""
    # A file that is no report, or of another version, is no reason to have no card.
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
