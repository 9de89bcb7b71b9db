"""`cbd-trl cache`."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cbd_trl.cli.parsing import (
    Command,
    UsageError,
    changed_flags,
    check_no_adapter,
    loading_options,
    require,
    training_rows,
)

if TYPE_CHECKING:
    from trl import ModelConfig, ScriptArguments


@dataclass
class CacheArguments:
    """Arguments of `cbd-trl cache`, besides those of ScriptArguments, SFTConfig and ModelConfig.

    Args:
        kind: what is kept of each prediction.
        k: tokens or draws of a position.
        temperature: the log-probabilities are taken at.
        value_bits: of a log-probability.
        batch_size: rows in one forward pass.
        hidden_dtype: of hidden states.
        logprobs: file of log-probabilities to import instead of running the teacher.
    """

    kind: str = field(
        default="top_k",
        metadata={
            "help": "top_k: the k most likely tokens and the mass of all others. sampled: k draws, for an unbiased "
            "forward KL. hidden: the last hidden state, from which everything can be computed.",
            "choices": ["top_k", "sampled", "hidden"],
        },
    )
    k: int = field(default=64, metadata={"help": "Tokens (top_k) or draws (sampled) kept at each position."})
    temperature: float = field(
        default=1.0, metadata={"help": "The log-probabilities are taken at: that of the training to come."}
    )
    value_bits: int = field(
        default=16, metadata={"help": "16 for quantized log-probabilities, 32 for exact ones.", "choices": [16, 32]}
    )
    batch_size: int = field(default=8, metadata={"help": "Rows in one forward pass of the teacher."})
    hidden_dtype: str | None = field(
        default=None,
        metadata={"help": "dtype of hidden states: float32, bfloat16 or float16. Not set: that of the teacher."},
    )
    logprobs: str | None = field(
        default=None,
        metadata={
            "help": "JSON-lines file of log-probabilities, such as vLLM's outputs, to make the cache of. The teacher "
            "(--model_name_or_path) then gives its tokenizer and vocabulary alone, and no dataset is read."
        },
    )


def _types() -> list[type]:
    from trl import ModelConfig, ScriptArguments, SFTConfig

    return [CacheArguments, ScriptArguments, SFTConfig, ModelConfig]


COMMAND = Command(
    "cache",
    "--model_name_or_path TEACHER --dataset_name DATA --output_dir DIR [options]",
    (
        "Write what a teacher (--model_name_or_path) predicts for a dataset to --output_dir, with the SFT flags of "
        "the training to come, such as --max_length. Run again, the command goes on where it was interrupted; on "
        "another dataset or split it adds the rows."
    ),
    own=(CacheArguments,),
    types=_types,
    defaults={"output_dir": "teacher-cache"},
)


def cache(flags: list[str]) -> None:
    """Run `cbd-trl cache`.

    Args:
        flags: as typed.
    """
    arguments, script, args, model = COMMAND.parse(flags)
    require(model_name_or_path=model.model_name_or_path)
    _check_ignored(arguments, args, model)
    if arguments.logprobs is None:
        require(dataset_name=script.dataset_name)
        manifest = _write_cache(arguments, script, args, model)
    else:
        manifest = _import_cache(arguments, args, model)
    size = sum(shard.num_bytes for shard in manifest.shards)
    print(
        f"{manifest.rows:,} rows, {manifest.tokens:,} tokens, {size / max(1, manifest.tokens):.0f} bytes per token in "
        f"{args.output_dir}. Training reads it without the teacher:"
    )
    print(f'    args = DistillConfig("distilled", teacher_cache={str(args.output_dir)!r})')
    print("    DistillTrainer(student, args=args, train_dataset=dataset).train()")


def _check_ignored(arguments: CacheArguments, args: Any, model: "ModelConfig") -> None:
    check_no_adapter(model, "a cache is written")
    if args.trust_remote_code:
        raise UsageError(
            "--trust_remote_code would run code of the teacher's repository, which a cache is never written with: it "
            "would be ignored. Leave it out, or import the teacher's log-probabilities with --logprobs."
        )
    of_forward = [name for name in changed_flags(arguments) if name in ("hidden_dtype", "batch_size")]
    if arguments.logprobs is not None and of_forward:
        raise UsageError(
            f"--{of_forward[0]} is for running the teacher, and with --logprobs it is not run: it would be ignored. "
            "Leave one of the two out."
        )


def _write_cache(arguments: CacheArguments, script: "ScriptArguments", args: Any, model: "ModelConfig") -> Any:
    from cbd_trl.cache import write_cache

    assert script.dataset_name is not None and model.model_name_or_path is not None
    return write_cache(
        model.model_name_or_path,
        training_rows(script),
        args.output_dir,
        args=args,
        kind=arguments.kind,
        k=arguments.k,
        temperature=arguments.temperature,
        value_bits=arguments.value_bits,
        seed=args.seed,
        batch_size=arguments.batch_size,
        hidden_dtype=arguments.hidden_dtype,
        model_init_kwargs=loading_options(model, args.model_init_kwargs),
    )


def _import_cache(arguments: CacheArguments, args: Any, model: "ModelConfig") -> Any:
    from transformers import AutoConfig, AutoTokenizer

    from cbd_trl.cache import import_logprobs
    from cbd_trl.utils.formatting import readable_name

    if arguments.kind != "top_k" or arguments.temperature != 1.0:
        raise UsageError(
            f"--logprobs with --kind {arguments.kind} --temperature {arguments.temperature}: a file of "
            "log-probabilities makes a cache of kind top_k at temperature 1."
        )
    assert arguments.logprobs is not None and model.model_name_or_path is not None
    name, revision = model.model_name_or_path, model.model_revision
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    return import_logprobs(
        arguments.logprobs,
        args.output_dir,
        processing_class=AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False),
        vocabulary_rows=config.get_text_config().vocab_size,
        teacher=readable_name(name),
        k=arguments.k,
        value_bits=arguments.value_bits,
    )
