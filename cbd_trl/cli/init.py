"""`cbd-trl init`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cbd_trl.cli.parsing import Command, UsageError, parse_shape, parse_sizes, require
from cbd_trl.utils.formatting import format_bytes, format_count, parse_count, with_active
from cbd_trl.utils.lazy import NamesOf

if TYPE_CHECKING:
    from cbd_trl.targets.many import TargetSummary


@dataclass
class InitArguments:
    """Arguments of `cbd-trl init`.

    Args:
        output: folder of the model, or of the folders of several.
        num_parameters: size wanted.
        sizes: several sizes wanted.
        dry_run: tell what would be made, and make nothing.
        shape: config fields that are fixed.
        operator: how the target's weights are made.
        alpha: weight of the lower anchor in a mix.
        dtype: of the model.
        tolerance: largest relative distance from `num_parameters`.
        shape_search: number of shapes compared.
        memory_limit: memory that weights and cache are to fit.
        context_length: tokens in that cache.
        storage: how the weights will be kept there.
        flops_limit: FLOPs that a token may take.
        calibration_data: text that decides how much is mixed, and the shape where several are compared.
        revision: of a chain on the Hub.
    """

    output: str | None = field(
        default=None,
        metadata={
            "help": "Folder that the model is written to; with --sizes, each model to a folder in it named after its "
            "size (100M). Required, but for a dry run."
        },
    )
    num_parameters: str | None = field(
        default=None,
        metadata={"help": "Parameters wanted: 138e6, 138M or 1.2B. A tied table counts once."},
    )
    sizes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Several numbers of parameters, 100M,120M,140M, made in one pass. Run again, finished models are "
            "kept."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Print shape, parameters, memory and cost of inference of what would be made, and make nothing."
        },
    )
    shape: str | None = field(
        default=None,
        metadata={
            "help": "Config fields that are fixed, as JSON: '{\"num_hidden_layers\": 20}'. In YAML a mapping. Alone, "
            "or with --num-parameters or --sizes, which then decide the rest."
        },
    )
    operator: str = field(
        default="nested",
        metadata={
            "help": "Rule that makes the weights from the two neighboring anchors.",
            "choices": NamesOf("cbd_trl.targets.operators", "OPERATORS"),
        },
    )
    alpha: float | None = field(
        default=None,
        metadata={"help": "Weight of the lower anchor where the operator mixes, 0 to 1. Not set: from the size."},
    )
    dtype: str | None = field(
        default=None,
        metadata={"help": "dtype of the model: float32, bfloat16 or float16. Not set: that of the anchors."},
    )
    tolerance: float = field(
        default=0.03, metadata={"help": "Largest distance from --num-parameters, as a share of it."}
    )
    shape_search: int | None = field(
        default=None,
        metadata={
            "help": "Number of shapes of a size to compare, such as 16: the best on --calibration-data is made, or "
            "without it the one that loses least by the chain's statistics. Not set: the shape on the line between "
            "the anchors."
        },
    )
    memory_limit: str | None = field(
        default=None,
        metadata={
            "help": "Make the largest model whose weights in --storage and key/value cache of --context-length tokens "
            "fit: 250MB (10^6 bytes), 250MiB or 1.5GB. Instead of --num-parameters, --sizes and --shape."
        },
    )
    context_length: int | None = field(
        default=None, metadata={"help": "Tokens in the cache that --memory-limit counts, such as 4096."}
    )
    storage: str | None = field(
        default=None,
        metadata={
            "help": "How the weights will be kept, for --memory-limit: int8 and nf4 are those of bitsandbytes, f16 "
            "and the rest types of GGUF. Not set: bf16.",
            "choices": NamesOf("cbd_trl.shapes.storage", "STORAGES"),
        },
    )
    flops_limit: str | None = field(
        default=None,
        metadata={
            "help": "Make the largest model whose forward pass takes at most so many FLOPs a token, 2e8 or 200M, "
            "attention to the context aside. Alone or with --memory-limit."
        },
    )
    calibration_data: str | None = field(
        default=None,
        metadata={
            "help": "Text (a .jsonl, .json, .csv, .parquet or .txt file, or a dataset's Hub id) by whose loss the "
            "blocks and the mix are chosen, other than that of the anchors. Not set: no data is needed."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of a chain on the Hub."})


COMMAND = Command(
    "init",
    "CHAIN --num-parameters N --output DIR [options]",
    "Make models of any size between the anchors of a chain, without a teacher and without training.",
    own=(InitArguments,),
    types=lambda: [InitArguments],
    others="the names of the operators",
    hyphens=True,
    positional={"chain": "The chain: a folder that build wrote, or a Hub id. Required."},
)


def init(flags: list[str]) -> None:
    """Run `cbd-trl init`.

    Args:
        flags: as typed.
    """
    arguments, places = COMMAND.parse(flags)
    if places.chain is None:
        raise UsageError("The chain is missing: cbd-trl init CHAIN --num-parameters N --output DIR.")
    if arguments.sizes is not None and arguments.num_parameters is not None:
        raise UsageError("--sizes and --num-parameters both name sizes. Give one of them.")
    sizes = None if arguments.sizes is None else parse_sizes(arguments.sizes)
    options = {
        "operator": arguments.operator,
        "alpha": arguments.alpha,
        "dtype": arguments.dtype,
        "tolerance": arguments.tolerance,
    }
    options |= {"config": parse_shape(arguments.shape), "shape_search": arguments.shape_search}
    size = None if arguments.num_parameters is None else parse_count(arguments.num_parameters)
    given = {
        "memory_limit": arguments.memory_limit,
        "context_length": arguments.context_length,
        "storage": arguments.storage,
        "flops_limit": None if arguments.flops_limit is None else parse_count(arguments.flops_limit),
    }
    limits = {name: value for name, value in given.items() if value is not None}
    if limits and sizes is not None:
        raise UsageError(f"--{next(iter(limits)).replace('_', '-')} is for one model, and --sizes names several.")
    if arguments.dry_run and limits:
        _describe_within(places.chain, size, given, arguments, options)
        return
    options |= limits
    if arguments.dry_run:
        _describe(places.chain, [size] if sizes is None else sizes, arguments, options)
        return
    require(output=arguments.output)
    if arguments.calibration_data is not None:
        from cbd_trl.utils.datasets import load_rows

        options["calibration_dataset"] = load_rows(arguments.calibration_data)
    if sizes is None:
        _make_one(places.chain, size, arguments, options)
    else:
        _make_many(places.chain, sizes, arguments, options)


def _make_one(chain: str, size: float | None, arguments: InitArguments, options: dict[str, Any]) -> None:
    from cbd_trl.targets.from_chain import from_chain

    model = from_chain(chain, size, revision=arguments.revision, save_directory=arguments.output, **options)
    print(_sentence(model.config.cbd_trl))
    print(f"Written to {arguments.output}: AutoModelForCausalLM.from_pretrained({arguments.output!r}) loads it.")


def _make_many(chain: str, sizes: list[float], arguments: InitArguments, options: dict[str, Any]) -> None:
    from cbd_trl.targets.many import make_targets

    assert arguments.output is not None
    made = make_targets(chain, sizes, arguments.output, revision=arguments.revision, **options)
    for target in made:
        if target.provenance is not None:
            kept = " Kept from an earlier run." if target.kept else ""
            print(f"{target.directory}: {_sentence(target.provenance)}{kept}")
    _check_failed([(format_count(target.requested), target.error) for target in made if target.error], len(made))


def _describe(chain: str, sizes: Sequence[float | None], arguments: InitArguments, options: dict[str, Any]) -> None:
    from cbd_trl.chain.chain import Chain
    from cbd_trl.targets.many import describe_shapes, describe_targets
    from cbd_trl.targets.request import Request

    opened = Chain.from_pretrained(chain, revision=arguments.revision, verify=False)
    config, search = options.pop("config"), options.pop("shape_search")
    summaries, failed = [], []
    for size in sizes:
        try:
            if search is None:
                summaries += describe_targets(opened, None if size is None else [size], config=config, **options)
            else:
                # The reason why a shape cannot be searched for where it is given.
                checked = Request(size, config, shape_search=search)
                assert checked.size is not None
                summaries += describe_shapes(opened, checked.size, search, **options)
        except ValueError as error:
            if len(sizes) == 1:
                raise
            failed.append((format_count(size or 0), str(error)))
    _print_summaries(summaries, opened.name_or_path, arguments)
    _check_failed(failed, len(sizes))


def _describe_within(
    chain: str, size: float | None, limits: dict[str, Any], arguments: InitArguments, options: dict[str, Any]
) -> None:
    from cbd_trl.chain.chain import Chain
    from cbd_trl.targets.limits import read_limits
    from cbd_trl.targets.many import describe_within

    config, search = options.pop("config"), options.pop("shape_search")
    read = read_limits(**limits, num_parameters=size, config=config)
    assert read is not None
    opened = Chain.from_pretrained(chain, revision=arguments.revision, verify=False)
    _print_summaries(describe_within(opened, read, search, **options), opened.name_or_path, arguments)


def _print_summaries(summaries: "Sequence[TargetSummary]", chain: str, arguments: InitArguments) -> None:
    from cbd_trl.report.tables import target_table
    from cbd_trl.utils.progress import make_console

    make_console().print(target_table(summaries, f"What {chain} would give"))
    if arguments.calibration_data is not None:
        changed = "shape, operator" if arguments.shape_search else "operator"
        print(f"With --calibration-data the {changed} and alpha may turn out otherwise, by what is measured on it.")
    for summary in summaries:
        if summary.engine_limit:
            print(f"{format_count(summary.num_parameters)}: {summary.engine_limit}")
    print("Nothing was built or written: this is a dry run.")


def _sentence(made: dict[str, Any]) -> str:
    """Describe a target from its `model.config.cbd_trl`, in a sentence or two."""
    from cbd_trl.architectures.registry import describe_shape

    total = made["num_parameters"]
    count = with_active(f"{total:,}", total, made.get("active_parameters", total))
    text = f"{count} parameters, {describe_shape(made['shape'])}: "
    text += f"operator {made['operator']} of {' and '.join(made['anchors'])}"
    if made["alpha"] is not None:
        text += f", alpha {made['alpha']:.3g}"
    if made.get("swapped_blocks"):
        text += f", blocks {made['swapped_blocks']} from the upper one"
    if made.get("limits"):
        text += f", the largest within {_limits_of(made['limits'])}"
    if "shape_search" in made:
        text += f", the best of up to {made['shape_search']['shapes']} shapes"
    if "calibration_tokens" in made:
        text += f"; chosen by the loss on {made['calibration_tokens']:,} tokens of calibration text"
    return text + "." + (f" {made['engine_limit']}" if "engine_limit" in made else "")


def _limits_of(limits: dict[str, Any]) -> str:
    parts = []
    if limits["memory_limit"] is not None:
        size, tokens = format_bytes(limits["memory_limit"]), limits["context_length"]
        parts.append(f"{size} in {limits['storage']} with a cache of {tokens:,} tokens")
    if limits["flops_limit"] is not None:
        parts.append(f"{format_count(limits['flops_limit'])} FLOPs a token")
    return " and ".join(parts)


def _check_failed(failed: list[tuple[str, str]], count: int) -> None:
    """Check that every size could be made.

    Raises:
        ValueError: naming those that could not, with the reason of each.
    """
    if failed:
        reasons = " ".join(f"{size}: {error}" for size, error in failed)
        raise ValueError(f"{len(failed)} of {count} sizes cannot be made. {reasons}")
