"""Train a model of any size from a chain with TRL's GRPOTrainer and a reward that is a rule.

    python examples/grpo.py --chain my-chain --num_parameters 60e6 --dataset trl-lib/tldr \
        --output_dir grpo-60M --beta 0.04

Every field of GRPOConfig is a flag. Without a GPU: --use_cpu True --bf16 False.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

from cbd_trl import from_chain


@dataclass
class Arguments:
    """What the script needs beside the training arguments."""

    chain: str = field(metadata={"help": "folder or Hub id of a chain"})
    num_parameters: float = field(metadata={"help": "size of the model to start from"})
    dataset: str = field(metadata={"help": "Hub id or folder of a dataset with a column `prompt`"})


def few_repetitions(completions: list[Any], **kwargs: Any) -> list[float]:
    """The share of words that an answer has not used before: small models like to go round in circles.

    Args:
        completions: answers, as text or as messages.
        kwargs: the other columns of the batch.

    Returns:
        a reward from 0 to 1 for each.
    """
    texts = [answer if isinstance(answer, str) else answer[-1]["content"] for answer in completions]
    return [len(set(words)) / max(len(words), 1) for words in map(str.split, texts)]


if __name__ == "__main__":
    arguments, training = HfArgumentParser((Arguments, GRPOConfig)).parse_args_into_dataclasses()
    dataset = load_dataset(arguments.dataset, split="train")
    # With beta > 0 the trainer loads its reference by the model's name, which is this folder: what training begins at.
    # A model that is saved nowhere has no name that a reference could be loaded by.
    model = from_chain(
        arguments.chain, arguments.num_parameters, save_directory=Path(training.output_dir, "untrained")
    )
    trainer = GRPOTrainer(model, reward_funcs=few_repetitions, args=training, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
