"""`cbd-trl consolidate`: train the anchors of a chain together for the sizes between them."""

from dataclasses import dataclass, field

from cbd_trl.cli.parsing import Command, UsageError, evaluation_rows, require, training_rows


@dataclass
class ConsolidateArguments:
    """Arguments of `cbd-trl consolidate` beside those of the training.

    Args:
        chain_revision: of a chain on the Hub.
        calibration_tokens: tokens behind the new statistics.
    """

    chain_revision: str | None = field(default=None, metadata={"help": "Revision of a chain on the Hub."})
    calibration_tokens: int = field(
        default=8192, metadata={"help": "Tokens of the training text behind the new statistics."}
    )


def _types() -> list[type]:
    from trl import ScriptArguments

    from cbd_trl.trainers.distill_config import DistillConfig

    return [ConsolidateArguments, ScriptArguments, DistillConfig]


COMMAND = Command(
    "consolidate",
    "CHAIN --dataset_name DATA --output_dir DIR [options]",
    (
        "Train the anchors of a chain together for the sizes between them, into a new chain: each step distills one "
        "size from the largest anchor, which stays as it is. The options of the training are those of cbd-trl "
        "distill, such as --max_steps and --learning_rate. Run again, the command goes on where it was interrupted."
    ),
    own=(ConsolidateArguments,),
    types=_types,
    others="the options of TRL's ScriptArguments and of DistillConfig",
    positional={"chain": "The chain: a folder that build wrote, or a Hub id. Required."},
    defaults={"output_dir": "consolidated"},
)


def consolidate(flags: list[str]) -> None:
    """Run `cbd-trl consolidate`.

    Args:
        flags: as typed.
    """
    own, script, args, places = COMMAND.parse(flags)
    if places.chain is None:
        raise UsageError("The chain is missing: cbd-trl consolidate CHAIN --dataset_name DATA --output_dir DIR.")
    require(dataset_name=script.dataset_name)
    from accelerate import PartialState

    from cbd_trl.build.consolidate import consolidate_chain

    chain = consolidate_chain(
        places.chain,
        training_rows(script),
        output_dir=args.output_dir,
        args=args,
        eval_dataset=evaluation_rows(script, args),
        calibration_tokens=own.calibration_tokens,
        revision=own.chain_revision,
    )
    PartialState().print(
        f"The consolidated chain is in {args.output_dir}: {', '.join(anchor.name for anchor in chain.anchors)}."
    )
