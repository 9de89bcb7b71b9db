"""A tiny chain from a Llama to a GPT-2 with a tokenizer of its own."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from cbd_trl import BridgeStep, Chain, build_chain
from tests.chain.helpers import chain_config
from tests.tiny import tiny_model
from tests.trainers.bridge_runs import make_bridge_config, students_tokenizer, teachers_tokenizer
from tests.trainers.bridge_runs import texts as bridge_texts

ANCHORS: list[dict[str, Any]] = [{"n_embd": 16, "n_inner": 64, "n_head": 2}]


def rows(count: int = 8, seed: int = 0) -> Dataset:
    return Dataset.from_dict({"text": bridge_texts(count, seed)})


def source(seed: int = 2) -> PreTrainedModel:
    """A Llama of 2 layers and 420 vocabulary rows."""
    return tiny_model("llama", seed=seed, vocab_size=420, num_hidden_layers=2, max_position_embeddings=128)


def anchor_zero(seed: int = 1) -> PreTrainedModel:
    """A GPT-2 of 4 layers and 300 vocabulary rows, not yet trained."""
    return tiny_model("gpt2", seed=seed, vocab_size=300, n_positions=128)


def bridge_config(**overrides: Any) -> Any:
    """Three steps, a checkpoint after each."""
    return make_bridge_config(**{"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "seed": 3, **overrides})


def bridge_step(**overrides: Any) -> BridgeStep:
    """On text of its own."""
    options = {"model": anchor_zero(), "processing_class": students_tokenizer(), "args": bridge_config()}
    return BridgeStep(**{**options, "dataset": rows(seed=5), **overrides})


def build_bridged(folder: Path, **options: Any) -> Chain:
    """The chain of the tests, unless told otherwise: `source`, `anchors`, or arguments of `build_chain`."""
    places = [options.pop("source", None) or source(), options.pop("anchors", ANCHORS)]
    defaults: dict[str, Any] = {"dataset": rows(), "eval_dataset": rows(3, seed=9), "args": chain_config()}
    defaults |= {"processing_class": teachers_tokenizer(), "calibration_tokens": 256}
    if "bridge" not in options:
        options["bridge"] = bridge_step()
    return build_chain(*places, output_dir=folder, **{**defaults, **options})
