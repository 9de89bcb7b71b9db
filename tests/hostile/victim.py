"""The chain that is tampered with, and everything that one does with a chain."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cbd_trl import Chain, from_chain
from cbd_trl.architectures import describe
from cbd_trl.chain.chain import STATISTICS_FILE, write_anchor
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.surgery.statistics import collect_statistics
from cbd_trl.surgery.statistics_file import save_statistics
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

LARGE, SMALL = "large", "small"
NARROW = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
BETWEEN = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


def write_chain(folder: Path) -> Path:
    """A chain of two anchors of random weights, the lower one half as wide."""
    large = tiny_model("llama")
    architecture = describe(large.config)
    small = type(large)(cut_architecture(architecture, NARROW).config).eval()
    blocks = [[layer] for layer in range(architecture.depth)]
    records: list[dict[str, Any]] = [{"name": LARGE}, {"name": SMALL, "parent": LARGE, "blocks": blocks}]
    text = torch.arange(3, 51).view(4, 12)
    for record, model in zip(records, (large, small), strict=True):

        def fill(place: Path, model: Any = model) -> None:
            model.save_pretrained(place)
            tiny_tokenizer().save_pretrained(place)
            shape = describe(model.config)
            save_statistics([collect_statistics(model, shape, [{"input_ids": text}])], shape, place / STATISTICS_FILE)

        write_anchor(folder, {**record, "losses": {"ce": 2.5}, "training": {"seed": 1}}, fill)
    return folder


def use(place: str | Path, verify: bool = True) -> dict[str, torch.Tensor]:
    """Everything that one does with a chain; what a model between its anchors weighs."""
    chain = Chain.from_pretrained(place, verify=verify)
    chain.sizes()
    for anchor in chain.anchors:
        anchor.load_model()
        anchor.load_tokenizer()
        anchor.load_statistics()
    return dict(from_chain(chain, config=BETWEEN).state_dict())


def seal(folder: Path, change: Callable[[dict[str, Any]], None] = lambda body: None) -> None:
    """Change chain.json and give it the checksum that fits, as somebody would who has read the format."""
    file = folder / "chain.json"
    body = json.loads(file.read_text())
    change(body)
    body.pop("checksum", None)
    body["checksum"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(body, indent=2))


def plant(folder: Path, name: str, content: bytes, anchor: str = LARGE) -> None:
    """Put a file into an anchor and record it, with the sha256 that fits."""
    file = folder / anchor / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    record(folder, name, content, anchor)


def record(folder: Path, name: str, content: bytes, anchor: str = LARGE) -> None:
    """List a file in chain.json with the sha256 of this content."""

    def change(body: dict[str, Any]) -> None:
        for entry in body["anchors"]:
            if entry["name"] == anchor:
                entry["files"][name] = hashlib.sha256(content).hexdigest()

    seal(folder, change)
