"""The card of a target."""

from collections.abc import Iterator, Mapping
from typing import Any

from cbd_trl.architectures.registry import describe_shape
from cbd_trl.cards.card import PICTURE, Card, code, generate_with, plain
from cbd_trl.cards.metadata import card_metadata, license_sentence
from cbd_trl.chain.cards import AnyChain, chain_name, chain_origins, hub_id, weight_hashes
from cbd_trl.utils.formatting import format_count

# What makes a target of both anchors; the others take one of them, cut or grown.
_MERGING = ("nested", "patch", "linear")


def target_card(chain: AnyChain, told: Mapping[str, Any], name: str) -> str:
    """The card of a target.

    Args:
        chain: that it was made of.
        told: what `model.config.cbd_trl` says.
        name: of the folder it is saved in.

    Returns:
        the text of its README.md.

    Raises:
        ValueError: the metadata are nothing that the Hub takes.
    """
    origins, before = chain_origins(chain), hub_id(chain)
    data = card_metadata(
        origins,
        relation="merge" if told["operator"] in _MERGING else "finetune",
        name=plain(name),
        tags=["from_chain"],
        before=[] if before is None else [before],
    )
    size = format_count(told["num_parameters"])
    card = Card(
        title=f"{plain(name)}: {size} from {chain_name(chain)}",
        summary=f"A stock transformers model of {told['num_parameters']:,} parameters that "
        "[cbd_trl](https://arxiv.org/abs/2605.07783) made from the weights of a chain, without a teacher and without "
        "training.",
        facts=dict(_facts(chain, told)),
        use=generate_with(name),
        license=license_sentence(origins),
        picture=(chain.path / PICTURE).is_file(),
    )
    return card.text(data)


def _facts(chain: AnyChain, told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "chain", code(chain_name(chain)) + (f" at commit {code(chain.revision)}" if chain.revision else "")
    yield "operator", code(told["operator"])
    if told["alpha"] is not None:
        yield "weight of the lower anchor", f"{told['alpha']:.4g}"
    if "swapped_blocks" in told:
        yield "blocks of the upper anchor", code(told["swapped_blocks"])
    if "calibration_tokens" in told:
        yield "chosen by its loss on", f"{told['calibration_tokens']:,} tokens"
    yield "shape", plain(describe_shape(told["shape"]))
    for anchor in chain.anchors:
        if anchor.name in told["anchors"]:
            digests = ", ".join(map(code, weight_hashes(anchor).values()))
            seen = f"{anchor.num_parameters:,} parameters, {anchor.tokens_seen:,} tokens seen"
            yield f"anchor {anchor.name}", f"{seen}, sha256 {digests}"
    if "engine_limit" in told:
        yield "outside of transformers", plain(told["engine_limit"])
    yield "tokens seen here", "0"
