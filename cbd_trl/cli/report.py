"""`cbd-trl report`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cbd_trl.cli.parsing import Command, UsageError, parse_names, parse_sizes, require


@dataclass
class ReportArguments:
    """Arguments of `cbd-trl report`.

    Args:
        data: held-out text.
        output: folder of the report.
        compare: another chain.
        sizes: sizes wanted.
        operators: rules that make the weights, and the controls.
        tasks: of lm-eval.
        include_path: folder of task files of one's own.
        limit: examples of each task.
        blocks: of held-out text.
        block_length: tokens in each.
        batch_size: blocks in one forward pass.
        tolerance: largest relative distance from a size.
        split: of a dataset on the Hub.
        text_column: the column of the text.
        seed: of the random models.
        revision: of a chain on the Hub.
        compare_revision: of the other one.
        cards: whether the chains' cards show it.
    """

    data: str | None = field(
        default=None,
        metadata={
            "help": "Held-out text that no anchor learnt from: a .jsonl, .json, .csv, .parquet or .txt file, or a "
            "dataset's Hub id. Required."
        },
    )
    output: str = field(
        default="chain-report",
        metadata={"help": "Folder of report.html, report.png and report.json. A second run measures what is missing."},
    )
    compare: str | None = field(
        default=None, metadata={"help": "Another chain, a folder or a Hub id, to set beside the first."}
    )
    sizes: list[str] | None = field(
        default=None,
        metadata={"help": "Numbers of parameters, 50M,60M,70M. Not set: three between each two anchors."},
    )
    operators: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rules that make the weights, the first of which decides the shapes: those of `cbd-trl init "
            "--operator`, and random for untrained models. Not set: nested, the controls, and random."
        },
    )
    tasks: list[str] | None = field(
        default=None,
        metadata={"help": "Tasks, groups or tags of lm-eval, hellaswag,arc_easy. Needs pip install 'cbd-trl[eval]'."},
    )
    include_path: str | None = field(
        default=None, metadata={"help": "Folder of lm-eval task files (YAML) of your own."}
    )
    limit: int | None = field(default=None, metadata={"help": "The first examples of each task only."})
    blocks: int = field(default=64, metadata={"help": "Blocks of held-out text."})
    block_length: int | None = field(
        default=None, metadata={"help": "Tokens in a block. Not set: 256, or what the models have positions for."}
    )
    batch_size: int = field(default=4, metadata={"help": "Blocks, or rows of a task, in one forward pass."})
    tolerance: float = field(default=0.03, metadata={"help": "Largest distance from a size, as a share of it."})
    split: str = field(default="test", metadata={"help": "Split of a dataset on the Hub; a file is one."})
    text_column: str = field(
        default="text",
        metadata={"help": "Column of the text; chats, and prompts with completions, are found by themselves."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random models."})
    revision: str | None = field(default=None, metadata={"help": "Revision of a chain on the Hub."})
    compare_revision: str | None = field(default=None, metadata={"help": "Revision of the other chain on the Hub."})
    cards: bool = field(
        default=False,
        metadata={"help": "Put table and picture on the cards of the chain, a folder; push sends them with it."},
    )


COMMAND = Command(
    "report",
    "CHAIN --data FILE [--output DIR] [options]",
    (
        "Measure a chain: held-out loss, bits per byte and tasks of every anchor and of the sizes between, with "
        "controls, as a page, a picture and a JSON file. Run again, the command goes on where it was interrupted."
    ),
    own=(ReportArguments,),
    hyphens=True,
    positional={"chain": "The chain: a folder that build wrote, or a Hub id. Required."},
)


def report(flags: list[str]) -> None:
    """Run `cbd-trl report`.

    Args:
        flags: as typed.
    """
    arguments, places = COMMAND.parse(flags)
    if places.chain is None:
        raise UsageError("The chain is missing: cbd-trl report CHAIN --data FILE.")
    require(data=arguments.data)
    from cbd_trl.report.measure import CONTROLS, ReportOptions

    options = ReportOptions(
        sizes=None if arguments.sizes is None else parse_sizes(arguments.sizes),
        operators=parse_names(arguments.operators) or CONTROLS,
        tasks=parse_names(arguments.tasks),
        include_path=arguments.include_path,
        limit=arguments.limit,
        blocks=arguments.blocks,
        block_length=arguments.block_length,
        batch_size=arguments.batch_size,
        tolerance=arguments.tolerance,
        text_field=arguments.text_column,
        seed=arguments.seed,
    )
    _measure(arguments, places.chain, options)


def _measure(arguments: ReportArguments, name: str, options: Any) -> None:
    from cbd_trl.chain.chain import Chain
    from cbd_trl.report.findings import compare_chains, findings
    from cbd_trl.report.measure import load_held_out, measure_chains
    from cbd_trl.report.page import save_measurements, write_report
    from cbd_trl.report.tables import sweep_table
    from cbd_trl.utils.files import Results
    from cbd_trl.utils.modeling import quiet
    from cbd_trl.utils.progress import Progress, make_console

    assert arguments.data is not None
    output = Path(arguments.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file, and --output names the folder of the report. Give another name.")
    results = Results(output / "results.json")
    rows = load_held_out(arguments.data, arguments.split)
    chains = [Chain.from_pretrained(name, revision=arguments.revision)]
    if arguments.compare is not None:
        chains.append(Chain.from_pretrained(arguments.compare, revision=arguments.compare_revision))
    if arguments.cards and (pulled := [chain.name_or_path for chain in chains if chain.revision is not None]):
        raise ValueError(
            f"--cards writes into the chain's folder, and {', '.join(pulled)} is on the Hub. Save it into a folder "
            "first: Chain.from_pretrained(...).save_pretrained(...)."
        )
    console = make_console()
    with quiet(messages=True), Progress("measuring") as bar:
        measured = measure_chains(chains, rows, options, results, bar.at)
    files = write_report(measured, output, Path(arguments.data).name, options.tasks)
    for chain, found in zip(chains, measured, strict=True):
        if arguments.cards:
            save_measurements(chain, found)
        console.print(sweep_table(found, title=found["name"]))
        for sentence in findings(found):
            console.print(sentence, highlight=False, markup=False)
    if len(measured) > 1 and (text := compare_chains(measured)):
        console.print(text, highlight=False, markup=False)
    print(f"Written: {', '.join(map(str, files))}")
