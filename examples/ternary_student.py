"""Distill a student whose linear layers weigh -1, 0 or 1 (BitNet b1.58, arXiv 2402.17764), through transformers.

    python examples/ternary_student.py --chain my-chain --num_parameters 60e6 --dataset trl-lib/Capybara \
        --output_dir ternary-60M

Training rounds the weights in every forward pass and moves the unrounded ones (a straight-through gradient).
Every field of DistillConfig is a flag. Without a GPU: --use_cpu True --bf16 False.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, BitNetQuantConfig, HfArgumentParser

from cbd_trl import Chain, DistillConfig, DistillTrainer, from_chain


@dataclass
class Arguments:
    """What the script needs beside the training arguments."""

    chain: str = field(metadata={"help": "folder or Hub id of a chain"})
    num_parameters: float = field(metadata={"help": "size of the student"})
    dataset: str = field(metadata={"help": "Hub id or folder of a dataset in any format of SFTTrainer"})


if __name__ == "__main__":
    arguments, training = HfArgumentParser((Arguments, DistillConfig)).parse_args_into_dataclasses()
    dataset = load_dataset(arguments.dataset, split="train")
    chain = Chain.from_pretrained(arguments.chain)
    start = Path(training.output_dir, "full-precision")
    anchors = from_chain(chain, arguments.num_parameters, save_directory=start).config.cbd_trl["anchors"]
    # transformers loads a BitNet only where the config of the folder names it one.
    config = AutoConfig.from_pretrained(start)
    config.quantization_config = BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="online").to_dict()
    student = AutoModelForCausalLM.from_pretrained(start, config=config)
    trainer = DistillTrainer(student, chain[anchors[0]].load_model(), args=training, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
