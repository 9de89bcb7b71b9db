"""Distill on what the student itself writes: TRL's DistillationTrainer, with the anchor above as teacher.

    python examples/on_policy.py --chain my-chain --num_parameters 60e6 --dataset trl-lib/tldr \
        --output_dir on-policy-60M

Every field of DistillationConfig is a flag. Without a GPU: --use_cpu True --bf16 False.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import HfArgumentParser
from trl import DistillationConfig, DistillationTrainer

from cbd_trl import Chain, from_chain


@dataclass
class Arguments:
    """What the script needs beside the training arguments."""

    chain: str = field(metadata={"help": "folder or Hub id of a chain"})
    num_parameters: float = field(metadata={"help": "size of the student"})
    dataset: str = field(metadata={"help": "Hub id or folder of a dataset with a column `prompt`"})


if __name__ == "__main__":
    arguments, training = HfArgumentParser((Arguments, DistillationConfig)).parse_args_into_dataclasses()
    dataset = load_dataset(arguments.dataset, split="train")
    chain = Chain.from_pretrained(arguments.chain)
    student = from_chain(chain, arguments.num_parameters)
    upper_anchor = chain[student.config.cbd_trl["anchors"][0]]
    trainer = DistillationTrainer(
        student, teacher_model=upper_anchor.load_model(), args=training, train_dataset=dataset
    )
    trainer.train()
    trainer.save_model()
