"""The one tokenizer of a chain: a hash of it, and anchors with another one refused."""

import hashlib
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

from cbd_trl.chain.records import Anchor
from cbd_trl.teachers.tokenizers import tokenizer_difference

ONE_TOKENIZER = (
    "The anchors of a chain share one tokenizer: a target's vocabulary rows are interpolated token by token, so a row "
    "must stand for the same token in all of them. To come from another tokenizer, begin the chain with "
    "build_chain(..., bridge=BridgeStep(...)), or first give the model this tokenizer with "
    "cbd_trl.bridge.transplant_vocabulary."
)
# Not those of padding and end: training may give a tokenizer its own (`pad_token`, `eos_token`), and no id changes.
_ROLES = ("bos_token", "unk_token", "sep_token", "cls_token", "mask_token")
# What a tokenizer was last called with, and the version of the format.
_NO_RULES = ("padding", "truncation", "version")
# Of tokenizers that have no tokenizer.json.
_RULE_FILES = ("vocab*", "merges*", "added_tokens*", "*.model", "tekken*")


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what decides which ids a text becomes, and which text ids are.

    Vocabulary, merges, rules for splitting, normalising and decoding, added tokens, and which tokens stand for the
    begin of a text, for what is unknown, and the like. Chat templates, and which tokens pad and end, are left out.

    Args:
        tokenizer: any that can be saved.

    Returns:
        64 hexadecimal digits, those of `stored_tokenizer_hash` once it is saved.

    Raises:
        ValueError: it saves nothing that says what its tokens are.
    """
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        found = stored_tokenizer_hash(Path(folder))
    if found is None:
        raise ValueError(
            f"A {type(tokenizer).__name__} saves no file that says what its tokens are (tokenizer.json, or a "
            "vocabulary), so nobody could read the chain's text with it. Pass a tokenizer as AutoTokenizer loads it."
        )
    return found


def stored_tokenizer_hash(folder: Path) -> str | None:
    """The `tokenizer_hash` of the tokenizer in a folder, None where there is none."""
    config_file, rules_file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not config_file.is_file():
        return None
    config = json.loads(config_file.read_text(encoding="utf-8"))
    roles = {role: _content(config[role]) for role in _ROLES if config.get(role) is not None}
    rules = _rules(json.loads(rules_file.read_text(encoding="utf-8"))) if rules_file.is_file() else _file_rules(folder)
    if not rules:
        return None
    return hashlib.sha256(json.dumps([roles, rules], sort_keys=True).encode()).hexdigest()


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


def _content(token: Any) -> str:
    """A token as tokenizer_config.json has it: text, or an object."""
    return str(token["content"] if isinstance(token, dict) else token)


def _rules(backend: dict[str, Any]) -> dict[str, Any]:
    rules = {name: value for name, value in backend.items() if name not in _NO_RULES}
    # Whether an added token is called special changes no id.
    added = [{key: value for key, value in token.items() if key != "special"} for token in backend["added_tokens"]]
    return {**rules, "added_tokens": added}


def _file_rules(folder: Path) -> dict[str, str]:
    files = {file for pattern in _RULE_FILES for file in folder.glob(pattern)}
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _difference(above: Anchor, anchor: Anchor) -> str:
    one, other = above.load_tokenizer(), anchor.load_tokenizer()
    names = f"{above.name}'s", f"{anchor.name}'s"
    # Each way, because tokens that only the second one has are not compared.
    return (
        tokenizer_difference(one, other, names=names)
        or tokenizer_difference(other, one, names=names[::-1])
        or "they have one vocabulary, but other rules for text or another begin or unknown token"
    )
