"""A hash of what a tokenizer means."""

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

from cbd_trl.utils.model_folders import read_object
from cbd_trl.utils.untrusted import reading

# Not those of padding and end: training may give a tokenizer its own (`pad_token`, `eos_token`), and no id changes.
_ROLES = ("bos_token", "unk_token", "sep_token", "cls_token", "mask_token")
# What a tokenizer was last called with, and the version of the format.
_NO_RULES = ("padding", "truncation", "version")
# Of tokenizers that have no tokenizer.json.
_RULE_FILES = ("vocab*", "merges*", "added_tokens*", "*.model", "tekken*")
# A vocabulary of a million tokens is far smaller.
_LARGEST_BYTES = 2**28


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


def stored_tokenizer_hash(folder: Path, way_out: str = "Save the tokenizer again.") -> str | None:
    """The `tokenizer_hash` of the tokenizer in a folder, None where there is none.

    Raises:
        ValueError: its files cannot be read; the message ends with the way out.
    """
    config_file, rules_file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not config_file.is_file():
        return None
    config = read_object(config_file, way_out)
    backend = read_object(rules_file, way_out, _LARGEST_BYTES) if rules_file.is_file() else None
    with reading(config_file if backend is None else rules_file, "a tokenizer", way_out):
        roles = {role: _content(config[role]) for role in _ROLES if config.get(role) is not None}
        rules = _file_rules(folder) if backend is None else _rules(backend)
    if not rules:
        return None
    return hashlib.sha256(json.dumps([roles, rules], sort_keys=True).encode()).hexdigest()


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
