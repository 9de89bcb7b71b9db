"""Build a prompt into a model: an adapter learns to answer without it as the model answers with it.

    python examples/system_prompt.py --model HuggingFaceTB/SmolLM2-135M-Instruct --before pirate.json \
        --dataset questions.jsonl --output_dir pirate

`--before` is a JSON file with the messages that the teacher reads before each prompt: a system prompt, examples. The
teacher is the model itself, which first writes the answers. Every field of DistillConfig is a flag. Without a GPU:
--use_cpu True --bf16 False.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig
from transformers import HfArgumentParser

from cbd_trl import DistillConfig, DistillTrainer
from cbd_trl.generation import DecodingConfig, generate_completions, read_completions
from cbd_trl.utils.datasets import load_rows


@dataclass
class Arguments:
    """What the script needs beside the training arguments."""

    model: str = field(metadata={"help": "folder or Hub id of a chat model"})
    before: str = field(metadata={"help": "JSON file with the messages before each prompt"})
    dataset: str = field(metadata={"help": "file or Hub id of a dataset with a column `prompt`, as text"})
    max_new_tokens: int = field(default=64, metadata={"help": "of an answer"})


if __name__ == "__main__":
    arguments, training = HfArgumentParser((Arguments, DistillConfig)).parse_args_into_dataclasses()
    before = json.loads(Path(arguments.before).read_text())
    prompts = load_rows(arguments.dataset).map(
        lambda row: {"prompt": [*before, {"role": "user", "content": row["prompt"]}]}
    )
    answers = Path(training.output_dir, "answers.jsonl")
    decoding = DecodingConfig(max_new_tokens=arguments.max_new_tokens)
    generate_completions(arguments.model, prompts, answers, decoding=decoding, use_cpu=training.use_cpu)
    rows = read_completions(answers).map(lambda row: {"teacher_prompt": row["prompt"], "prompt": row["prompt"][-1:]})
    training.self_distillation = True
    trainer = DistillTrainer(
        arguments.model,
        args=training,
        train_dataset=rows,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()
