"""Write a report: one HTML page without scripts, fonts or pictures from elsewhere, a picture, and a JSON file."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers.utils import logging

from cbd_trl import __version__
from cbd_trl.cards.card import PICTURE
from cbd_trl.chain.cards import save_cards
from cbd_trl.chain.chain import Chain
from cbd_trl.chain.measurements import MEASURED, table_rows
from cbd_trl.report.findings import UNITS, compare_chains, findings, shared_unit
from cbd_trl.report.plots import (
    comparison_chart,
    loss_axis,
    loss_chart,
    losses_above,
    plot_side_by_side,
    plot_sweep,
    task_axis,
    task_chart,
)
from cbd_trl.report.sweep import RANDOM
from cbd_trl.targets.operators import OPERATORS
from cbd_trl.utils.files import write_text
from cbd_trl.utils.formatting import format_count

logger = logging.get_logger(__name__)

_LIBRARIES = ("torch", "transformers", "trl")
# The page may style itself and nothing else: no browser fetches or runs anything for it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(
    chains: Sequence[Mapping[str, Any]], output: Path | str, data: str, tasks: Sequence[str] = ()
) -> list[Path]:
    """Write what was measured of chains into a folder.

    Args:
        chains: from `measure_chains`.
        output: the folder.
        data: what the held-out text is called.
        tasks: that were requested.

    Returns:
        report.html, report.png and report.json. In the latter a loss that is not a number is null.
    """
    folder = Path(output)
    report = {
        "version": __version__,
        "versions": {name: version(name) for name in (*_LIBRARIES, *(["lm-eval"] if tasks else []))},
        "data": data,
        "tasks": list(tasks),
        "chains": list(chains),
    }
    paths = [folder / f"report.{kind}" for kind in ("html", "png", "json")]
    write_text(paths[0], render_page(report))
    plot_side_by_side(chains, [f"{chain['name']}: held-out {data}" for chain in chains], paths[1])
    write_text(paths[2], json.dumps(_finite(report), indent=1, allow_nan=False) + "\n")
    return paths


def save_measurements(chain: Chain, report: Mapping[str, Any]) -> None:
    """Keep what was measured of a chain in its folder, as JSON and as a picture, and rewrite its cards.

    The chain is whole without them: where they cannot be written there is a warning.

    Args:
        chain: the chain, in a folder.
        report: what was measured of it (`cbd_trl.report.sweep.sweep`).
    """
    # It goes to the Hub with the chain, where nobody should read the names of the folders here.
    kept = {key: value for key, value in report.items() if key != "path" or report.get("revision") is not None}
    if "name" in kept:
        kept["name"] = Path(kept["name"]).name
    try:
        write_text(chain.path / MEASURED, json.dumps(kept, indent=1) + "\n")
        plot_sweep(report, chain.path / PICTURE, formats=("png",))
    except OSError as error:
        logger.warning(
            f"The measurements of the chain in {chain.path} were not written ({error}); the chain itself is whole."
        )
    save_cards(chain)


def render_page(report: Mapping[str, Any]) -> str:
    """Render the whole page.

    Args:
        report: what report.json holds (see `write_report`).
    """
    chains = report["chains"]
    names = " and ".join(chain["name"] for chain in chains)
    pair = " pair" if len(chains) > 1 else ""
    style = files("cbd_trl.report").joinpath("page.css").read_text(encoding="utf-8")
    body = [_header(report, names)]
    if pair:
        body.append(_comparison(chains))
    together = shared_unit(chains) == "loss"
    sections = [_chain(chain, loss_axis(chains if together else [chain]), len(chains)) for chain in chains]
    body.append(_columns(sections, pair))
    for task in chains[0]["anchors"][0]["probes"]:
        body.append(_columns([_task(chain, task, chains) for chain in chains], pair))
    body.append(_how(report))
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(names)}: what every size is worth</title>\n<style>\n{style}</style>\n</head>",
            f'<body>\n<main class="{pair.strip()}">',
            *body,
            f"<footer>Made by cbd_trl {escape(report['version'])}. The numbers are in report.json.</footer>",
            "</main>\n</body>\n</html>\n",
        ]
    )


def _header(report: Mapping[str, Any], names: str) -> str:
    text = report["chains"][0]["text"]
    sizes = sum(len(chain["anchors"]) + len(chain["targets"]) for chain in report["chains"])
    return (
        f"<header><h1>{escape(names)}</h1><p>What every size is worth: {sizes} sizes on {text['tokens']:,} held-out "
        f"tokens of <code>{escape(report['data'])}</code>. No size between the anchors was trained.</p></header>"
    )


def _columns(sections: Sequence[str], pair: str) -> str:
    return f'<div class="columns{pair}">{"".join(sections)}</div>'


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _comparison(chains: Sequence[Mapping[str, Any]]) -> str:
    key = shared_unit(chains)
    if key is None:
        return _section(
            "Side by side",
            _note(
                "These chains read different tokens, and the bytes of one's are not known: their losses cannot be "
                "compared."
            ),
        )
    comparison = compare_chains(chains)
    first = next((name for chain in chains for target in chain["targets"] for name in target["loss"]), "the anchors")
    return _section(
        "Side by side",
        comparison_chart(chains, key),
        _note(f"Anchors and sizes made by {first}, in {UNITS[key]}: lower is better."),
        f'<ul class="findings"><li>{escape(comparison)}</li></ul>' if comparison else "",
    )


def _chain(chain: Mapping[str, Any], axis: tuple[float, float], columns: int) -> str:
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(chain))
    note = "Lower is better. Rest on a mark for its shape and number; every number is in the table. "
    return _section(
        f"{chain['name']}: held-out loss",
        loss_chart(chain, axis, columns),
        _note(note + losses_above(chain, axis[1])),
        f'<h3>Findings</h3><ul class="findings">{sentences}</ul>' if sentences else "",
        _table(*table_rows(chain)),
    )


def _task(chain: Mapping[str, Any], task: str, chains: Sequence[Mapping[str, Any]]) -> str:
    score = chain["anchors"][0]["probes"][task]
    better = "Higher is better" if score["higher_is_better"] else "Lower is better"
    return _section(
        f"{chain['name']}: {task}",
        task_chart(chain, task, task_axis(chains, task), len(chains)),
        _note(
            f"{better}: {score['metric']} on {score['examples']:,} examples, with the standard error where lm-eval "
            "gives one. It does not tell apart two sizes that lie within it of each other."
        ),
        _table(*table_rows(chain, task=task)),
    )


def _table(header: Sequence[str], rows: Sequence[Any]) -> str:
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in header)
    body = []
    for row in rows:
        cells = "".join(
            f"<td{' class=best' if number in row.best else ''}>{escape(cell)}</td>"
            for number, cell in enumerate(row.cells)
        )
        body.append(f"<tr{' class=is-anchor' if row.anchor else ''}>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _how(report: Mapping[str, Any]) -> str:
    used = dict.fromkeys(name for chain in report["chains"] for target in chain["targets"] for name in target["loss"])
    summaries = {name: operator.summary for name, operator in OPERATORS.items()}
    summaries[RANDOM] = "Control: the same shape with fresh weights."
    facts = {name: summaries[name] for name in used}
    facts["held-out loss"] = (
        "Mean cross-entropy of the next token, in nats, over the same blocks for every model. A block begins as the "
        "tokenizer begins a text; that token, or else the first one of the block, is only read."
    )
    if any(chain["text"]["bytes"] for chain in report["chains"]):
        facts["bits/byte"] = (
            "The same loss in bits, divided by the bytes of text that the scored tokens stand for: it can be "
            "compared across tokenizers. In the table that of the anchors and the first operator."
        )
    facts["seconds"] = "To make the model of the first operator, files read included."
    for chain in report["chains"]:
        facts[chain["name"]] = _describe_chain(chain)
    if report["tasks"]:
        facts["tasks"] = f"{', '.join(report['tasks'])}; lm-eval {report['versions']['lm-eval']}."
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return _section("How to read it", f"<dl>{items}</dl>")


def _describe_chain(chain: Mapping[str, Any]) -> str:
    text, revision = chain["text"], f" at {chain['revision']}" if chain["revision"] else ""
    in_bytes = f", {text['bytes']:,} bytes" if text["bytes"] else ""
    trained = ", ".join(
        f"{anchor['name']} ({format_count(anchor['tokens_seen'])} tokens)"
        for anchor in chain["anchors"]
        if anchor["tokens_seen"]
    )
    return (
        f"{chain['path']}{revision}, {chain['model_type']}. {text['blocks']} blocks of {text['block_length']} tokens: "
        f"{text['tokens']:,} scored{in_bytes}.{f' Distilled: {trained}.' if trained else ''}"
    )


def _note(text: str) -> str:
    return f'<p class="note">{escape(text.strip())}</p>'


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
