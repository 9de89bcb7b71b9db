"""`cbd-trl generate`."""

from dataclasses import dataclass, field

from cbd_trl.cli.parsing import Command, UsageError, check_no_adapter, loading_options, require, training_rows
from cbd_trl.generation.decoding import DecodingConfig


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


def _types() -> list[type]:
    from trl import ModelConfig, ScriptArguments

    return [GenerateArguments, DecodingConfig, ScriptArguments, ModelConfig]


COMMAND = Command(
    "generate",
    "--model_name_or_path TEACHER --dataset_name PROMPTS --output_file FILE [options]",
    (
        "Have a teacher (--model_name_or_path) complete the prompts of a dataset into --output_file: a dataset "
        "of prompts, completions and why each ended, for SeqKD. Run again, it goes on where it was interrupted."
    ),
    own=(GenerateArguments, DecodingConfig),
    types=_types,
    others="the options of TRL's ScriptArguments and ModelConfig",
)


def generate(flags: list[str]) -> None:
    """Run `cbd-trl generate`.

    Args:
        flags: as typed.
    """
    arguments, decoding, script, model = COMMAND.parse(flags)
    require(
        model_name_or_path=model.model_name_or_path,
        dataset_name=script.dataset_name,
        output_file=arguments.output_file,
    )
    check_no_adapter(model, "a corpus is generated")
    if script.dataset_streaming:
        raise UsageError(
            "--dataset_streaming: a run that goes on where it was interrupted needs rows by number, which a stream "
            "does not have. Leave it out, or write the rows you want to a file."
        )
    from accelerate import PartialState

    from cbd_trl.generation.generate import generate_completions

    corpus = generate_completions(
        model.model_name_or_path,
        training_rows(script),
        arguments.output_file,
        decoding=decoding,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        prompt_tokens=arguments.prompt_tokens,
        model_init_kwargs={name: value for name, value in loading_options(model).items() if value is not None},
        use_cpu=arguments.use_cpu,
        disable_tqdm=arguments.disable_tqdm,
    )
    PartialState().print(
        f"{corpus.rows:,} rows in {corpus.file}, {corpus.truncated:,} of them cut off after {decoding.max_new_tokens} "
        "tokens. A student learns from them by --objective seqkd or SFT, without the teacher: "
        f"--dataset_name {corpus.file}"
    )
