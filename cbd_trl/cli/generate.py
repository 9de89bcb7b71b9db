"""What `cbd-trl generate` does."""

from dataclasses import dataclass, field
from typing import Any

from trl import ModelConfig, ScriptArguments

from cbd_trl.cli.parsing import UsageError, parse_flags, refuse_adapter, require
from cbd_trl.utils.datasets import load_rows


@dataclass
class GenerateArguments:
    """Arguments of `cbd-trl generate`, besides those of DecodingConfig, ScriptArguments and ModelConfig.

    Args:
        output_file: of the completions.
        prompt_tokens: tokens of a `text` that are its prompt.
        batch_size: prompts completed together.
        seed: of the draws.
        use_cpu: run the teacher on the CPU.
        disable_tqdm: show no progress.
    """

    output_file: str | None = field(
        default=None,
        metadata={"help": "JSON-lines file of the completions, in the order of the dataset. Required."},
    )
    prompt_tokens: int | None = field(
        default=None,
        metadata={
            "help": "For a dataset of `text`: tokens of each that are the prompt; 0 has the teacher begin by itself."
        },
    )
    batch_size: int = field(default=8, metadata={"help": "Prompts completed together, on each device."})
    seed: int = field(default=0, metadata={"help": "Seed of the draws."})
    use_cpu: bool = field(default=False, metadata={"help": "Run the teacher on the CPU."})
    disable_tqdm: bool = field(default=False, metadata={"help": "Show no progress."})


def generate(flags: list[str]) -> None:
    """cbd-trl generate.

    Args:
        flags: as typed.
    """
    from accelerate import PartialState

    from cbd_trl.generation import DecodingConfig, generate_completions

    description = (
        "Have a teacher (--model_name_or_path) complete the prompts of a dataset into --output_file: a dataset "
        "of prompts, completions and why each ended, for SeqKD. Run again, it goes on where it was interrupted."
    )
    types = [GenerateArguments, DecodingConfig, ScriptArguments, ModelConfig]
    arguments, decoding, script, model = parse_flags("generate", description, types, flags)
    require(
        model_name_or_path=model.model_name_or_path,
        dataset_name=script.dataset_name,
        output_file=arguments.output_file,
    )
    refuse_adapter(model, "a corpus is generated")
    if script.dataset_streaming:
        raise UsageError(
            "--dataset_streaming: a run that goes on where it was interrupted needs rows by number, which a stream "
            "has not. Leave it out, or write the rows you want to a file."
        )
    corpus = generate_completions(
        model.model_name_or_path,
        load_rows(script.dataset_name, script.dataset_config, script.dataset_train_split),
        arguments.output_file,
        decoding=decoding,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        prompt_tokens=arguments.prompt_tokens,
        model_init_kwargs=_init_kwargs(model),
        use_cpu=arguments.use_cpu,
        disable_tqdm=arguments.disable_tqdm,
    )
    PartialState().print(
        f"{corpus.rows:,} rows in {corpus.file}, {corpus.truncated:,} of them cut off after {decoding.max_new_tokens} "
        "tokens. A student learns from them by --objective seqkd or SFT, without the teacher: "
        f"--dataset_name {corpus.file}"
    )


def _init_kwargs(model: ModelConfig) -> dict[str, Any]:
    from trl import get_quantization_config

    options = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "quantization_config": get_quantization_config(model),
    }
    return {name: value for name, value in options.items() if value is not None}
