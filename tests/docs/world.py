"""What the guides speak of, under the names that they have for it: models, rows and chains, of tiny size."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cbd_trl import Chain, DistillConfig, build_chain
from tests.bridge.tokenizers_of_kinds import make_tokenizer
from tests.chain.hub_server import Hub
from tests.docs.reading import ROOT
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

# Layers and widths of the guides, and those of the tiny models in their place.
_FIELDS: dict[str, dict[int, int]] = {
    "num_hidden_layers": {16: 6, 20: 7},
    "hidden_size": {384: 24},
    "intermediate_size": {1152: 68, 1024: 34},
    "num_attention_heads": {6: 3},
    "num_key_value_heads": {2: 1},
    "n_layer": {6: 3},
}
_SOURCE = {"hidden_size": 48, "intermediate_size": 68, "num_attention_heads": 6, "num_key_value_heads": 2}


def miniature(text: str) -> str:
    """A step at the scale of the tiny models: a million parameters or bytes is a thousand; layers, widths, tokens are
    theirs.

    Args:
        text: a command, Python or YAML of a guide. Names with a size in them (`my-60M`) stay.
    """
    text = re.sub(r"(?<![\w/-])(\d+(?:\.\d+)?)M\b(?![-\w])", r"\1K", text)
    text = re.sub(r"\b(\d+(?:\.\d+)?)e6\b", r"\1e3", text)
    text = re.sub(r"\b(\d+)MB\b", r"\1kB", text)
    text = re.sub(r"\b(context[_-]length[= ])4096\b", r"\g<1>64", text)
    text = re.sub(r"\bsize=8192\b", "size=300", text)
    for field, sizes in _FIELDS.items():
        pattern = re.compile(rf"\b({field}\"?: ?)(\d+)\b")
        text = pattern.sub(lambda found, sizes=sizes: found[1] + str(sizes.get(int(found[2]), int(found[2]))), text)
    return text


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _llama(folder: Path, layers: int = 8) -> None:
    shape = {**_SOURCE, "num_hidden_layers": layers, "max_position_embeddings": 512}
    _save(folder, tiny_model("llama", tie_word_embeddings=True, **shape), tiny_tokenizer())


def _qwen(folder: Path, layers: int) -> None:
    _save(folder, tiny_model("qwen3", num_hidden_layers=layers), tiny_tokenizer())


def _gpt2(folder: Path, width: int) -> None:
    _save(folder, tiny_model("gpt2", seed=width, n_embd=width, n_head=width // 8, n_layer=3), tiny_tokenizer())


def _teacher_of_other_tokens(folder: Path) -> None:
    _save(folder, tiny_model("llama", vocab_size=420, max_position_embeddings=256), make_tokenizer(size=420, seed=1))


def _student_of_other_tokens(folder: Path) -> None:
    _save(folder, tiny_model("gpt2", vocab_size=300, n_positions=256), make_tokenizer(size=300))


def _texts(count: int = 24) -> list[str]:
    return [" ".join(f"w{(5 * i + 3 * j) % 54}" for j in range(6 + i % 9)) for i in range(count)]


def _write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _text_rows(file: Path) -> None:
    _write_rows(file, [{"text": text} for text in _texts()])


def _prompts(file: Path) -> None:
    _write_rows(file, [{"prompt": text} for text in _texts(3)])


def _chats(folder: Path) -> None:
    folder.mkdir(parents=True)
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]} for text in _texts()
    ]
    for split, rows in (("train", chats[:16]), ("test", chats[16:])):
        _write_rows(folder / f"{split}.jsonl", rows)


def _in_a_folder(write: Callable[[Path], None], folder: Path) -> None:
    """A folder of one file, which `load_dataset` takes as it takes a dataset of the Hub."""
    folder.mkdir()
    write(folder / "train.jsonl")


def _chain(folder: Path) -> None:
    _llama(folder.with_name("source"))
    build_chain(
        folder.with_name("source"),
        [{"num_hidden_layers": 6}, 44e3],
        dataset=Dataset.from_dict({"text": _texts()}),
        output_dir=folder,
        args=DistillConfig("unused"),
        calibration_tokens=256,
    )


def _examples(folder: Path) -> None:
    shutil.copytree(ROOT / "examples", folder)
    for file in folder.rglob("*.yaml"):
        file.write_text(miniature(file.read_text()))


def small_recipes(folder: Path) -> Path:
    """The recipes that the package ships, at the scale of the tiny models.

    Args:
        folder: where they are to be.
    """
    shutil.copytree(ROOT / "cbd_trl" / "recipe" / "shipped", folder)
    for file in folder.glob("*.yaml"):
        file.write_text(miniature(file.read_text()))
    return folder


# What a guide may name without having made it. A new name: one line here.
INPUTS: dict[str, Callable[[Path], None]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _llama,
    "HuggingFaceTB/SmolLM2-360M-Instruct": _llama,
    "HuggingFaceTB/SmolLM2-135M": _teacher_of_other_tokens,
    "Qwen/Qwen3-0.6B": lambda folder: _qwen(folder, 2),
    "Qwen/Qwen3-4B": lambda folder: _qwen(folder, 4),
    "gpt2": lambda folder: _gpt2(folder, 64),
    "gpt2-medium": lambda folder: _gpt2(folder, 80),
    "gpt2-large": lambda folder: _gpt2(folder, 96),
    "TEACHER": lambda folder: _llama(folder, 2),
    "student": _student_of_other_tokens,
    "demo-output/chain": _chain,
    "my-chain": _chain,
    "me/my-chain": _chain,
    "trl-lib/Capybara": _chats,
    "DATA": lambda folder: _in_a_folder(_text_rows, folder),
    "PROMPTS": lambda folder: _in_a_folder(_prompts, folder),
    "rows.jsonl": _text_rows,
    "text.jsonl": _text_rows,
    "prompts.jsonl": _prompts,
    "held-out.jsonl": lambda file: _write_rows(file, [{"text": text} for text in _texts(60)]),
    "examples": _examples,
}
# Those that are on the Hub of the tests, and in no folder.
ON_THE_HUB = ("me/my-chain",)


class World:
    """Everything in `INPUTS`, each made when it is first named.

    Args:
        folder: where they are kept.
        hub: serves those of `ON_THE_HUB`.
    """

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.folder, self.hub = folder, hub

    def place(self, name: str, reader: Path) -> None:
        """Put a copy where a reader of a guide would have it, unless the guide has made it.

        Args:
            name: one of `INPUTS`.
            reader: the folder that the guide is followed in.
        """
        kept, wanted = self.folder / re.sub(r"\W", "-", name) / "it", reader / name
        if not kept.exists():
            kept.parent.mkdir(parents=True)
            INPUTS[name](kept)
        if name in ON_THE_HUB:
            self.hub.commit(name, kept, "main", "v1")
        elif not wanted.exists():
            wanted.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if kept.is_dir() else shutil.copy)(kept, wanted)


class _VLLM:
    """The `LLM` of vLLM, as far as a guide asks it: all tokens are as likely, at each place but the first."""

    def generate(self, prompts: list[list[int]], parameters: SimpleNamespace) -> list[SimpleNamespace]:
        k = parameters.prompt_logprobs
        place = {token: SimpleNamespace(logprob=-math.log(k)) for token in range(k)}
        return [
            SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=[None] + [place] * (len(ids) - 1)) for ids in prompts
        ]


# What a Python block may use without having made it. A new name: one line here.
VARIABLES: dict[str, Callable[[], Any]] = {
    "dataset": lambda: Dataset.from_dict({"text": _texts()}),
    "chain": lambda: Chain.from_pretrained("my-chain"),
    "json": lambda: json,
    "llm": _VLLM,
    "SamplingParams": lambda: SimpleNamespace,
    "token_prompts": lambda: [[7, 8, 9], [10, 11]],
}
