"""Train a LoRA adapter on a model of any size from a chain, and merge it.

    python examples/lora.py --chain my-chain --num_parameters 60e6 --dataset trl-lib/Capybara --output_dir lora-60M

Written under the output folder: `base`, the model from the chain; the adapter itself; `merged`, a model without it.
Every field of SFTConfig is a flag. Without a GPU: --use_cpu True --bf16 False.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from cbd_trl import from_chain


@dataclass
class Arguments:
    """What the script needs beside the training arguments."""

    chain: str = field(metadata={"help": "folder or Hub id of a chain"})
    num_parameters: float = field(metadata={"help": "size of the model to start from"})
    dataset: str = field(metadata={"help": "Hub id or folder of a dataset in any format of SFTTrainer"})
    rank: int = field(default=16, metadata={"help": "of the adapter"})


if __name__ == "__main__":
    arguments, training = HfArgumentParser((Arguments, SFTConfig)).parse_args_into_dataclasses()
    dataset = load_dataset(arguments.dataset, split="train")
    # The adapter's config names the base that it belongs on, so the base has to be somewhere.
    base = from_chain(arguments.chain, arguments.num_parameters, save_directory=Path(training.output_dir, "base"))
    adapter = LoraConfig(r=arguments.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(base, args=training, train_dataset=dataset, peft_config=adapter)
    trainer.train()
    trainer.save_model()
    merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    merged.save_pretrained(Path(training.output_dir, "merged"))
    trainer.processing_class.save_pretrained(Path(training.output_dir, "merged"))
