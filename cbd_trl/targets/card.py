"""Write the card of a target, a model that `from_chain` made."""

from collections.abc import Iterator, Mapping
from typing import Any

from cbd_trl.architectures.registry import describe_shape
from cbd_trl.cards.card import PICTURE, code, plain, render_card, usage_lines
from cbd_trl.cards.metadata import card_metadata, license_sentence
from cbd_trl.chain.cards import AnyChain, chain_name, chain_origins, hub_id, weight_hashes
from cbd_trl.utils.formatting import format_count

# The operators that mix both anchors; the others cut or grow one of them.
_MERGING = ("nested", "patch", "linear")


def target_card(chain: AnyChain, made: Mapping[str, Any], name: str) -> str:
    """Render the card of a target.

    Args:
        chain: that it was made from.
        made: how, from `model.config.cbd_trl`.
        name: of the folder it is saved in.

    Returns:
        the text of its README.md.
    """
    origins, before = chain_origins(chain), hub_id(chain)
    data = card_metadata(
        origins,
        relation="merge" if made["operator"] in _MERGING else "finetune",
        name=plain(name),
        tags=["from_chain"],
        before=[] if before is None else [before],
    )
    size = format_count(made["num_parameters"])
    return render_card(
        data,
        title=f"{plain(name)}: {size} from {chain_name(chain)}",
        summary=f"A stock transformers model of {made['num_parameters']:,} parameters that "
        "[cbd_trl](https://arxiv.org/abs/2605.07783) made from the weights of a chain, without a teacher and without "
        "training.",
        facts=dict(_facts(chain, made)),
        use=usage_lines(name),
        license=license_sentence(origins),
        picture=(chain.path / PICTURE).is_file(),
    )


def _facts(chain: AnyChain, made: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "chain", code(chain_name(chain)) + (f" at commit {code(chain.revision)}" if chain.revision else "")
    yield "operator", code(made["operator"])
    if made["alpha"] is not None:
        yield "weight of the lower anchor", f"{made['alpha']:.4g}"
    if "swapped_blocks" in made:
        yield "blocks of the upper anchor", code(made["swapped_blocks"])
    if "calibration_tokens" in made:
        yield "chosen by its loss on", f"{made['calibration_tokens']:,} tokens"
    yield "shape", plain(describe_shape(made["shape"]))
    for anchor in chain.anchors:
        if anchor.name in made["anchors"]:
            digests = ", ".join(map(code, weight_hashes(anchor).values()))
            seen = f"{anchor.num_parameters:,} parameters, {anchor.tokens_seen:,} tokens seen"
            yield f"anchor {anchor.name}", f"{seen}, sha256 {digests}"
    if "engine_limit" in made:
        yield "outside of transformers", plain(made["engine_limit"])
    yield "tokens seen here", "0"
