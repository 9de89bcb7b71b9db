"""What `cbd-trl init` does."""

from collections.abc import Sequence
from typing import Any

from cbd_trl.cli.arguments import InitArguments
from cbd_trl.cli.parsing import UsageError, parse_flags, parse_shape, parse_sizes, require
from cbd_trl.utils.datasets import load_rows
from cbd_trl.utils.formatting import parse_count


def init(flags: list[str]) -> None:
    """cbd-trl init.

    Args:
        flags: as typed.
    """
    description = "Make models of any size between the anchors of a chain, without a teacher and without training."
    positional = {"chain": "The chain: a folder that build wrote, or a Hub id. Required."}
    arguments, places = parse_flags("init", description, [InitArguments], flags, positional)
    if places.chain is None:
        raise UsageError("The chain is missing: cbd-trl init CHAIN --num-parameters N --output DIR.")
    if arguments.sizes is not None and arguments.num_parameters is not None:
        raise UsageError("--sizes and --num-parameters are two ways to say the same. Give one of them.")
    sizes = None if arguments.sizes is None else parse_sizes(arguments.sizes)
    options = {
        "config": parse_shape(arguments.shape),
        "operator": arguments.operator,
        "alpha": arguments.alpha,
        "dtype": arguments.dtype,
        "tolerance": arguments.tolerance,
    }
    size = None if arguments.num_parameters is None else parse_count(arguments.num_parameters)
    if arguments.dry_run:
        _describe(places.chain, [size] if sizes is None else sizes, arguments, options)
        return
    require(output=arguments.output)
    if arguments.calibration_data is not None:
        options["calibration_dataset"] = load_rows(arguments.calibration_data)
    if sizes is None:
        _make_one(places.chain, size, arguments, options)
    else:
        _make_many(places.chain, sizes, arguments, options)


def _make_one(chain: str, size: float | None, arguments: InitArguments, options: dict[str, Any]) -> None:
    from cbd_trl.targets.from_chain import from_chain

    model = from_chain(chain, size, revision=arguments.revision, save_directory=arguments.output, **options)
    print(_told(model.config.cbd_trl))
    print(f"Written to {arguments.output}: AutoModelForCausalLM.from_pretrained({arguments.output!r}) loads it.")


def _make_many(chain: str, sizes: list[float], arguments: InitArguments, options: dict[str, Any]) -> None:
    from cbd_trl.targets.many import make_targets
    from cbd_trl.utils.formatting import format_count

    assert arguments.output is not None
    made = make_targets(chain, sizes, arguments.output, revision=arguments.revision, **options)
    for target in made:
        if target.told is not None:
            print(f"{target.directory}: {_told(target.told)}{' Kept from an earlier run.' if target.kept else ''}")
    _refuse_failed([(format_count(target.asked), target.error) for target in made if target.error], len(made))


def _describe(chain: str, sizes: Sequence[float | None], arguments: InitArguments, options: dict[str, Any]) -> None:
    from cbd_trl.chain.chain import Chain
    from cbd_trl.report.tables import target_table
    from cbd_trl.targets.many import describe_targets
    from cbd_trl.utils.formatting import format_count
    from cbd_trl.utils.progress import make_console

    opened = Chain.from_pretrained(chain, revision=arguments.revision, verify=False)
    summaries, failed = [], []
    for size in sizes:
        try:
            summaries += describe_targets(opened, None if size is None else [size], **options)
        except ValueError as error:
            if len(sizes) == 1:
                raise
            failed.append((format_count(size or 0), str(error)))
    console = make_console()
    console.print(target_table(summaries, f"What {opened.name_or_path} would give"))
    if arguments.calibration_data is not None:
        print("With --calibration-data the operator and alpha may turn out otherwise, by measured loss.")
    for summary in summaries:
        if summary.engine_limit:
            print(f"{format_count(summary.num_parameters)}: {summary.engine_limit}")
    print("Nothing was built or written: this is a dry run.")
    _refuse_failed(failed, len(sizes))


def _told(told: dict[str, Any]) -> str:
    """What became of a target, in a sentence or two."""
    from cbd_trl.architectures.registry import describe_shape

    text = f"{told['num_parameters']:,} parameters, {describe_shape(told['shape'])}: "
    text += f"operator {told['operator']} of {' and '.join(told['anchors'])}"
    if told["alpha"] is not None:
        text += f", alpha {told['alpha']:.3g}"
    if told.get("swapped_blocks"):
        text += f", blocks {told['swapped_blocks']} from the upper one"
    if "calibration_tokens" in told:
        text += f"; chosen by the loss on {told['calibration_tokens']:,} tokens of calibration text"
    return text + "." + (f" {told['engine_limit']}" if "engine_limit" in told else "")


def _refuse_failed(failed: list[tuple[str, str]], count: int) -> None:
    """End with an error that names the sizes that cannot be had.

    Raises:
        ValueError: there are any.
    """
    if failed:
        reasons = " ".join(f"{size}: {error}" for size, error in failed)
        raise ValueError(f"{len(failed)} of {count} sizes cannot be made. {reasons}")
