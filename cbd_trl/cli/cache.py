"""What `cbd-trl cache` does."""

from typing import Any

from trl import ModelConfig, ScriptArguments

from cbd_trl.cli.arguments import CacheArguments
from cbd_trl.cli.parsing import UsageError, changed_flags, parse_flags, refuse_adapter, require
from cbd_trl.utils.datasets import load_rows


def cache(flags: list[str]) -> None:
    """cbd-trl cache.

    Args:
        flags: as typed.
    """
    from trl import SFTConfig

    description = (
        "Write what a teacher (--model_name_or_path) predicts for a dataset to --output_dir, with the SFT flags of "
        "the training to come, such as --max_length. Run again, the command goes on where it was interrupted; on "
        "another dataset or split it adds the rows."
    )
    arguments, script, args, model = parse_flags(
        "cache",
        description,
        [CacheArguments, ScriptArguments, SFTConfig, ModelConfig],
        flags,
        defaults={"output_dir": "teacher-cache"},
    )
    require(model_name_or_path=model.model_name_or_path)
    _refuse_ignored(arguments, args, model)
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


def _refuse_ignored(arguments: CacheArguments, args: Any, model: ModelConfig) -> None:
    refuse_adapter(model, "a cache is written")
    if args.trust_remote_code:
        raise UsageError(
            "--trust_remote_code would run code of the teacher's repository, which a cache is never written with: it "
            "would be ignored. Leave it out, or import the teacher's log-probabilities with --logprobs."
        )
    asking = [name for name in changed_flags(arguments) if name in ("hidden_dtype", "batch_size")]
    if arguments.logprobs is not None and asking:
        raise UsageError(
            f"--{asking[0]} is about asking the teacher, and with --logprobs it is not asked: it would be ignored. "
            "Leave one of the two out."
        )


def _write_cache(arguments: CacheArguments, script: ScriptArguments, args: Any, model: ModelConfig) -> Any:
    from trl import get_quantization_config

    from cbd_trl.cache import write_cache

    init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    if (quantization := get_quantization_config(model)) is not None:
        init_kwargs["quantization_config"] = quantization
    assert script.dataset_name is not None and model.model_name_or_path is not None
    return write_cache(
        model.model_name_or_path,
        load_rows(script.dataset_name, script.dataset_config, script.dataset_train_split, script.dataset_streaming),
        args.output_dir,
        args=args,
        kind=arguments.kind,
        k=arguments.k,
        temperature=arguments.temperature,
        value_bits=arguments.value_bits,
        seed=args.seed,
        batch_size=arguments.batch_size,
        hidden_dtype=arguments.hidden_dtype,
        model_init_kwargs=init_kwargs,
    )


def _import_cache(arguments: CacheArguments, args: Any, model: ModelConfig) -> Any:
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
