"""A source, text and a recipe of a chain that is built in a second."""

import copy
from pathlib import Path
from typing import Any

import yaml

from tests.chain.helpers import CHAIN_ANCHORS, chain_rows, chain_source
from tests.tokenizer import tiny_tokenizer

ARGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "max_length": 16,
    "learning_rate": 1.0e-3,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 3,
}


def write_inputs(folder: Path) -> None:
    """A model folder `source`, and the text files rows.jsonl, more.jsonl and held.jsonl."""
    chain_source().save_pretrained(folder / "source")
    tiny_tokenizer().save_pretrained(folder / "source")
    for seed, name in enumerate(("rows", "more", "held")):
        chain_rows(seed=seed).to_json(folder / f"{name}.jsonl")


def raw_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """What the recipe's YAML says.

    Args:
        folder: where `write_inputs` wrote.
        changes: other values for its keys; None leaves a key out.
    """
    recipe: dict[str, Any] = {
        "source": str(folder / "source"),
        "data": [
            {"name": str(folder / "rows.jsonl"), "share": 0.75},
            {"name": str(folder / "more.jsonl"), "share": 0.25},
        ],
        "anchors": [
            {"shape": copy.deepcopy(CHAIN_ANCHORS[0]), "args": {"learning_rate": 2.0e-3, "divergence": "reverse_kl"}},
            {"shape": copy.deepcopy(CHAIN_ANCHORS[1]), "data": str(folder / "more.jsonl")},
        ],
        "evaluation": {"data": str(folder / "held.jsonl"), "tokens": 64, "length": 16},
        "output_dir": str(folder / "chain"),
        "calibration_tokens": 64,
        "args": dict(ARGS),
    }
    return {key: value for key, value in {**recipe, **changes}.items() if value is not None}


def write_recipe(folder: Path, **changes: Any) -> Path:
    """The recipe as a file; see `raw_recipe`."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw_recipe(folder, **changes), sort_keys=False))
    return file
