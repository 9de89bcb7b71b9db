"""The whole journey in seconds, without a network: a random tiny model, a chain, models of other sizes, training one.

    python examples/pico.py [FOLDER]

The numbers mean nothing at this size. With a real model and text, only `make_source` and `make_rows` are different:
a Hub id and a dataset.
"""

import random
import sys
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from cbd_trl import Chain, DistillConfig, build_chain, from_chain

SUBJECTS = ["the cat", "a dog", "the bird", "my friend", "the old man", "a small child"]
VERBS = ["sees", "likes", "follows", "finds", "hears"]
PLACES = ["in the house", "by the river", "at night", "on the hill", "every day"]
# Runs anywhere: no GPU, no mixed precision, no trackers.
TRAINING = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "max_length": 32,
    "logging_steps": 2,
    "save_strategy": "no",
}


def make_rows(count: int = 64, seed: int = 0) -> Dataset:
    """Small sentences in the prompt-completion format of TRL.

    Args:
        count: how many rows.
        seed: of the choice of words.
    """
    choose = random.Random(seed).choice
    prompts = [f"{choose(SUBJECTS)} {choose(VERBS)}" for _ in range(count)]
    completions = [f" {choose(SUBJECTS)} {choose(PLACES)} ." for _ in range(count)]
    return Dataset.from_dict({"prompt": prompts, "completion": completions})


def make_source(folder: Path) -> str:
    """A random Llama of 6 layers with grouped-query heads and a tied table, saved with its tokenizer.

    Args:
        folder: where to save it.

    Returns:
        the folder as text, which stands where a Hub id could.
    """
    words = sorted({word for phrase in [*SUBJECTS, *VERBS, *PLACES, "."] for word in phrase.split()})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main(folder: Path) -> None:
    """Run the journey.

    Args:
        folder: of everything that is written.
    """
    rows = make_rows()
    source = make_source(folder / "source")

    # 1. Once, expensive: the chain. Each anchor is cut from the one above and distilled from it.
    build_chain(
        source,
        anchors=[{"num_hidden_layers": 4}, {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}],
        dataset=rows,
        output_dir=folder / "chain",
        args=DistillConfig(str(folder / "chain"), learning_rate=1e-3, **TRAINING),
        calibration_tokens=512,
    )
    chain = Chain.from_pretrained(folder / "chain")
    for anchor in chain.anchors:
        print(f"anchor {anchor.name}: {anchor.num_parameters:,} parameters, {anchor.shape}")

    # 2. As often as you like, in seconds: models between the anchors, by shape or by size.
    deep = from_chain(chain, config={"num_hidden_layers": 5})
    middle = sum(anchor.num_parameters for anchor in chain.anchors[1:]) / 2
    small = from_chain(chain, num_parameters=middle, tolerance=0.2, save_directory=folder / "small")
    for model in (deep, small):
        print(f"{model.num_parameters():,} parameters: {model.config.cbd_trl['shape']}")

    # 3. What comes out is a stock transformers model: load it, train it.
    model = AutoModelForCausalLM.from_pretrained(folder / "small")
    trainer = SFTTrainer(model=model, args=SFTConfig(str(folder / "tuned"), **TRAINING), train_dataset=rows)
    trainer.train()
    trainer.save_model()
    print(f"trained and saved: {folder / 'tuned'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "pico-output"))
