"""Cards: the README.md beside an anchor, a chain, a target or a distilled model, from one template."""

from cbd_trl.cards.files import CARD_FILES, copy_picture, current_card, save_card, save_cards
from cbd_trl.chain.cards import anchor_card
from cbd_trl.chain.chain_part import MEASURED, chain_card
from cbd_trl.targets.card import target_card

__all__ = [
    "CARD_FILES",
    "MEASURED",
    "anchor_card",
    "chain_card",
    "copy_picture",
    "current_card",
    "save_card",
    "save_cards",
    "target_card",
]
