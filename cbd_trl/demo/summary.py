"""The demo's results: report.json, report.md, the picture, and what the terminal shows at the end."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from cbd_trl.report.plots import plot_sweep
from cbd_trl.report.tables import format_count, markdown_table, measures, rich_table
from cbd_trl.utils.durations import format_seconds
from cbd_trl.utils.results import write_text

TITLE = "Any size from one chain: SmolLM2-135M-Instruct and two anchors distilled from it"


def findings(report: Mapping[str, Any]) -> list[str]:
    """What the numbers say, one sentence each.

    Args:
        report: what report.json holds.
    """
    losses = [target["loss"] for target in report["targets"]]
    ahead = sum(loss["nested"] < min(loss["linear"], loss["random"]) for loss in losses)
    source, *lower = sorted(report["anchors"], key=lambda anchor: -anchor["num_parameters"])
    gap = max(anchor["loss"] - source["loss"] for anchor in lower)
    return [
        f"nested is ahead of linear and of random at {ahead} of {len(losses)} sizes.",
        f"The anchors' held-out loss is within {gap:.2f} nats of the source's ({source['loss']:.2f}).",
    ]


def costs(report: Mapping[str, Any]) -> str:
    """What the run took, in one sentence.

    Args:
        report: what report.json holds.
    """
    kept = report["seconds"] - report["seconds_this_run"]
    earlier = f" ({format_seconds(kept)} of it in earlier runs)" if kept >= 1 else ""
    precision = "bf16 mixed precision" if report["bf16"] else "float32"
    tokens = max(anchor["tokens_seen"] for anchor in report["anchors"])
    return (
        f"{report['steps']} steps (about {round(tokens, -3):,} tokens) per anchor in {precision}; "
        f"{format_seconds(report['seconds'])}{earlier}, at most {report['peak_memory_gb']:.1f} GB of memory."
    )


def markdown(report: Mapping[str, Any]) -> str:
    """report.md.

    Args:
        report: what report.json holds.
    """
    answers = [
        f"- **{format_count(entry['num_parameters'])}** ({entry['kind']}): {_escape(entry['answer'])}"
        for entry in report["answers"]
    ]
    parts = [
        f"# {TITLE}",
        "![held-out loss against the number of parameters](loss.png)",
        f"{measures(report)}; on {report['held_out_tokens']} tokens that no anchor saw. Seconds to build the model "
        "with nested. No target was trained.",
        markdown_table(report),
        "\n".join(f"- {line}" for line in findings(report)) + f"\n- {costs(report)}",
        f"## What they say\n\n> {report['prompt']}",
        "\n".join(answers),
        f"## Use one\n\n`{report['model']}` is a normal model folder:",
        f"```python\n{_usage(report['model'])}\n```",
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def write_report(output: Path, report: Mapping[str, Any], console: Console) -> None:
    """Write report.json, report.md, loss.png and loss.svg, and show the table.

    Args:
        output: the demo's folder.
        report: what report.json is to hold.
        console: where the table is shown.
    """
    write_text(output / "report.json", json.dumps(report, indent=1) + "\n")
    write_text(output / "report.md", markdown(report))
    pictures = plot_sweep(report, output / "loss", title=TITLE)
    console.rule("[bold]Results")
    console.print(rich_table(report))
    for line in [*findings(report), costs(report)]:
        console.print(line, highlight=False)
    files = ", ".join(str(path) for path in [output / "report.json", output / "report.md", *pictures])
    console.print(f"Written: {files}", soft_wrap=True, highlight=False)
    console.print(
        f"The chain: {output / 'chain'}. Another size from it takes seconds:", soft_wrap=True, highlight=False
    )
    command = f"cbd-trl init {output / 'chain'} --num-parameters 100e6 --output my-100M"
    console.print(f"  {command}", soft_wrap=True, highlight=False)
    console.print(f"A normal model folder: {report['model']}", soft_wrap=True, highlight=False)
    for line in _usage(report["model"]).splitlines():
        console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)


def _usage(model: str) -> str:
    return (
        "from transformers import AutoModelForCausalLM, pipeline\n"
        f'model = AutoModelForCausalLM.from_pretrained("{model}")\n'
        f'pipeline("text-generation", model="{model}")("Once upon a time")'
    )


def _escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>#|" else letter for letter in text)
