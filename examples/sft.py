"""Fine-tune a model of any size from a chain with TRL's SFTTrainer.

    python examples/sft.py --chain my-chain --num_parameters 60e6 --dataset trl-lib/Capybara --output_dir tuned-60M

Every field of SFTConfig is a flag. Without a GPU: --use_cpu True --bf16 False.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from cbd_trl import from_chain


@dataclass
class Arguments:
    """What the script needs beside the training arguments."""

    chain: str = field(metadata={"help": "folder or Hub id of a chain"})
    num_parameters: float = field(metadata={"help": "size of the model to start from"})
    dataset: str = field(metadata={"help": "Hub id or folder of a dataset in any format of SFTTrainer"})


if __name__ == "__main__":
    arguments, training = HfArgumentParser((Arguments, SFTConfig)).parse_args_into_dataclasses()
    dataset = load_dataset(arguments.dataset, split="train")
    model = from_chain(arguments.chain, arguments.num_parameters)
    trainer = SFTTrainer(model, args=training, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
