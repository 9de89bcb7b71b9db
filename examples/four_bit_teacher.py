"""Distill from a teacher in 4 bits, so that one fits which would not: needs `pip install "cbd-trl[quantized]"`.

    python examples/four_bit_teacher.py --chain my-chain --num_parameters 60e6 --dataset trl-lib/Capybara \
        --teacher_model_name_or_path my-chain/135M --output_dir distilled-60M

The teacher may be the folder of an adapter that QLoRA trained: its base is loaded in 4 bits, with the adapter on top.
Every field of DistillConfig is a flag. Without a GPU: --use_cpu True --bf16 False.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import HfArgumentParser

from cbd_trl import DistillConfig, DistillTrainer, from_chain

# As QLoRA (arXiv 2305.14314) stores a base: 4-bit NormalFloat, and its scales quantized once more.
FOUR_BITS = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}


@dataclass
class Arguments:
    """What the script needs beside the training arguments."""

    chain: str = field(metadata={"help": "folder or Hub id of a chain"})
    num_parameters: float = field(metadata={"help": "size of the student"})
    dataset: str = field(metadata={"help": "Hub id or folder of a dataset in any format of SFTTrainer"})


if __name__ == "__main__":
    arguments, training = HfArgumentParser((Arguments, DistillConfig)).parse_args_into_dataclasses()
    training.teacher_model_init_kwargs = {"quantization_config": FOUR_BITS}
    dataset = load_dataset(arguments.dataset, split="train")
    student = from_chain(arguments.chain, arguments.num_parameters)
    trainer = DistillTrainer(student, args=training, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
