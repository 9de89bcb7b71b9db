"""Cards read as the Hub reads them, and followed as a reader follows them."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from markdown_it import MarkdownIt

SOURCE, HUB_ROWS = "org/source", "org/rows"
# What the Hub's documentation has for them.
_RELATIONS = {"finetune", "merge", "adapter", "quantized"}
_LICENSES = {"apache-2.0", "mit", "llama3.2", "other"}
_LISTS = ("base_model", "datasets", "tags")


def metadata(text: str) -> dict[str, Any]:
    """The metadata of a card, by two readers, held against the rules of the Hub's documentation."""
    data = ModelCard(text).data.to_dict()
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found and yaml.safe_load(found[1]) == data
    for key in _LISTS:
        assert isinstance(data.get(key, []), list), key
        assert len(set(data.get(key, []))) == len(data.get(key, [])), key
    for name in (*data.get("base_model", []), *data.get("datasets", [])):
        validate_repo_id(name)
    assert data["pipeline_tag"] == "text-generation" and data["library_name"] in ("transformers", "peft", "cbd_trl")
    assert "cbd_trl" in data["tags"]
    assert data.get("license", "mit") in _LICENSES
    assert data.get("license") != "other" or re.fullmatch(r"[\w.-]+", data["license_name"])
    assert re.match("https?://", data.get("license_link", "https://"))
    assert ("base_model_relation" in data) == ("base_model" in data)
    if "base_model" in data:
        assert data["base_model_relation"] in _RELATIONS
        assert len(data["base_model"]) >= (2 if data["base_model_relation"] == "merge" else 1)
    return data


def as_html(text: str) -> str:
    """What a reader sees of a card."""
    return MarkdownIt("commonmark").enable("table").render(text.split("\n---\n", 1)[1])


def use(text: str, folder: Path, monkeypatch: Any) -> dict[str, Any]:
    """What the three lines of a card define, run in a folder."""
    [block] = re.findall(r"^## How to use it\n\n```python\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)
    assert len(block.splitlines()) == 3
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {}
    exec(compile(block, "card", "exec"), found)
    return found


def read(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")
