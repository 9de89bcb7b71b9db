"""One optimizer step of a `BridgeDistillTrainer` on tiny models with byte-level tokenizers of different sizes."""

import functools
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from cbd_trl import BridgeDistillConfig, BridgeDistillTrainer
from tests.bridge.tokenizers_of_kinds import corpus, make_tokenizer
from tests.tiny import own_names, tiny_model
from tests.training import OUTPUT

TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@functools.cache
def students_tokenizer() -> PreTrainedTokenizerFast:
    """Of 300 tokens, with a chat template."""
    tokenizer = make_tokenizer("byte_level", 300)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@functools.cache
def teachers_tokenizer() -> PreTrainedTokenizerFast:
    """Of 420 tokens, trained on other texts."""
    return make_tokenizer("byte_level", 420, seed=1)


def texts(count: int = 4, seed: int = 0) -> list[str]:
    """Texts of different lengths, of the words that both tokenizers were trained on and of others."""
    return [text[: 12 + 9 * i] for i, text in enumerate(corpus(seed, count))]


def student(family: str = "llama", **overrides: Any) -> Any:
    """Of 2 layers and 300 vocabulary rows."""
    shape = own_names(family, num_hidden_layers=2, max_position_embeddings=128)
    return tiny_model(family, seed=1, **{"vocab_size": 300, **shape, **overrides})


def teacher(family: str = "gpt_neox", **overrides: Any) -> Any:
    """Of 4 layers and 420 vocabulary rows."""
    shape = own_names(family, max_position_embeddings=128)
    return tiny_model(family, seed=2, **{"vocab_size": 420, **shape, **overrides})


def make_bridge_config(**overrides: Any) -> BridgeDistillConfig:
    """Float32 on the CPU, quiet, one step over four rows, by "alm" alone.

    Args:
        overrides: fields of `BridgeDistillConfig`.
    """
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    step = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 4, "max_grad_norm": 0.0}
    defaults = {**quiet, **step, "output_dir": OUTPUT, "learning_rate": 1e-2, "max_length": 96}
    defaults |= {"objective": "alm", "hidden_weight": 0.0}
    return BridgeDistillConfig(**{**defaults, **overrides})


_ARGUMENTS = (
    "train_dataset",
    "eval_dataset",
    "processing_class",
    "teacher_processing_class",
    "block_map",
    "peft_config",
    "optimizers",
)


def make_bridge(**overrides: Any) -> BridgeDistillTrainer:
    """A llama of 2 layers that learns from a gpt_neox of 4.

    Args:
        overrides: `model`, `teacher_model`, other arguments of the trainer, or fields of its config.
    """
    arguments: dict[str, Any] = {
        "train_dataset": Dataset.from_dict({"text": texts()}),
        "processing_class": students_tokenizer(),
        "teacher_processing_class": teachers_tokenizer(),
    }
    models = [overrides.pop("model", None) or student(), overrides.pop("teacher_model", None) or teacher()]
    arguments |= {name: overrides.pop(name) for name in _ARGUMENTS if name in overrides}
    return BridgeDistillTrainer(*models, make_bridge_config(**overrides), **arguments)
