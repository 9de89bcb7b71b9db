"""The one tokenizer of a chain: anchors with another one are refused."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from cbd_trl.chain.manifest import Anchor
from cbd_trl.utils.tokenizers import tokenizer_difference

ONE_TOKENIZER = (
    "The anchors of a chain share one tokenizer: a target's vocabulary rows are interpolated token by token, so a row "
    "must stand for the same token in all of them. To come from another tokenizer, begin the chain with "
    "build_chain(..., bridge=BridgeStep(...)), or first give the model this tokenizer with "
    "cbd_trl.bridge.transplant_vocabulary."
)


def check_one_tokenizer(anchors: Sequence[Anchor], file: Path) -> None:
    """Refuse anchors with different tokenizers; those without one are passed over.

    Args:
        anchors: of one chain.
        file: chain.json, for the message.

    Raises:
        ValueError: naming two anchors, and what differs.
    """
    having = [anchor for anchor in anchors if anchor.tokenizer is not None]
    for above, anchor in pairwise(having):
        if anchor.tokenizer != above.tokenizer:
            raise ValueError(
                f"{file}: the anchors {above.name!r} and {anchor.name!r} have different tokenizers: "
                f"{_difference(above, anchor)}. {ONE_TOKENIZER}"
            )


def _difference(above: Anchor, anchor: Anchor) -> str:
    one, other = above.load_tokenizer(), anchor.load_tokenizer()
    names = f"{above.name}'s", f"{anchor.name}'s"
    # Each way, because tokens that only the second one has are not compared.
    return (
        tokenizer_difference(one, other, names=names)
        or tokenizer_difference(other, one, names=names[::-1])
        or "they have one vocabulary, but other rules for text or another begin or unknown token"
    )
