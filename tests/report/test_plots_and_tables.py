"""The picture and the tables of a sweep."""

import copy
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from cbd_trl.architectures.registry import describe_shape
from cbd_trl.chain.measurements import measurements_table, table_rows
from cbd_trl.report import plots
from cbd_trl.report.plots import comparison_chart, loss_axis, loss_chart, plot_sweep, task_axis, task_chart
from cbd_trl.report.tables import sweep_table
from cbd_trl.utils.formatting import format_count
from tests.report.helpers import made_up


def shape(depth, width=576):
    return {"num_hidden_layers": depth, "hidden_size": width, "num_attention_heads": 9, "num_key_value_heads": 3}


REPORT = {
    "anchors": [
        {"name": "135M", "num_parameters": 135_000_000, "shape": shape(30), "loss": 1.5},
        {"name": "85M", "num_parameters": 85_000_000, "shape": shape(16), "loss": 2.0},
        {"name": "44M", "num_parameters": 44_000_000, "shape": shape(16, 384), "loss": 2.5},
    ],
    "targets": [
        {
            "num_parameters": 110_000_000,
            "shape": shape(23),
            "seconds": 1.25,
            "loss": {"nested": 1.7, "linear": 9.5, "slice": 2.1, "random": 10.8},
        },
        {
            "num_parameters": 60_000_000,
            "shape": shape(16, 480),
            "seconds": 0.75,
            "loss": {"nested": 2.2, "linear": 2.6, "slice": 2.1, "random": 10.9},
        },
    ],
}


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    drawn = []

    class Kept(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            drawn.append(self)

    monkeypatch.setattr(plots, "Figure", Kept)
    return drawn


def test_picture_keeps_the_range_and_writes_high_losses_as_numbers(figures, tmp_path):
    written = plot_sweep(REPORT, tmp_path / "loss", title="A chain")
    assert [path.name for path in written] == ["loss.png", "loss.svg"]
    with Image.open(written[0]) as image:
        assert min(image.size) > 600
    strip, axes = figures[0].axes
    low, high = axes.get_ylim()
    assert low < 1.5 and 2.6 <= high < 4
    assert {text.get_text() for text in strip.texts} == {"9.5", "10.8", "10.9"}
    assert [label.get_text() for label in strip.get_yticklabels()] == ["linear", "random"]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(labels) == len(set(labels)) == 5 and any("nested" in label for label in labels)
    assert "nats per token" in axes.get_ylabel() and "parameters" in axes.get_xlabel()
    assert "100M" in [tick.get_text() for tick in axes.get_xticklabels()]
    assert {"135M · 1.50", "85M · 2.00", "44M · 2.50"} <= {text.get_text() for text in axes.texts}
    nested = next(line for line in axes.get_lines() if line.get_label().startswith("nested"))
    assert nested.get_linewidth() > 2.5


_DRAW = """
import json, sys
from pathlib import Path
from cbd_trl.report.plots import loss_axis, loss_chart, plot_sweep
report = json.loads(sys.stdin.read())
plot_sweep(report, Path(sys.argv[1]) / "loss")
Path(sys.argv[1], "chart.html").write_text(loss_chart(report, loss_axis([report])), encoding="utf-8")
"""


def test_another_process_draws_the_same_bytes(tmp_path):
    report = made_up()
    plot_sweep(report, tmp_path / "loss")
    (tmp_path / "chart.html").write_text(loss_chart(report, loss_axis([report])), encoding="utf-8")
    (tmp_path / "other").mkdir()
    command = [sys.executable, "-c", _DRAW, tmp_path / "other"]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, input=json.dumps(report), text=True, env=environment, check=True, timeout=300)
    for name in ("loss.png", "loss.svg", "chart.html"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name


def test_a_chart_of_the_page_follows_its_colors_and_can_be_read_aloud():
    report = made_up("a chain", task="hellaswag")
    for chart, title in (
        (loss_chart(report, loss_axis([report])), "Held-out loss of a chain against size"),
        (task_chart(report, "hellaswag", task_axis([report], "hellaswag")), "hellaswag of a chain against size"),
        (
            comparison_chart([report, made_up("another", 0.2)], "loss"),
            "a chain and another: nats per token against size",
        ),
    ):
        figure = ElementTree.fromstring(chart)
        drawings = figure.findall("div/svg")
        assert [drawing.get("aria-label") for drawing in drawings] == [title] * 2
        ids = [element.get("id") for element in figure.iter() if element.get("id")]
        assert len(ids) == len(set(ids))
        targets = [element.get("href")[1:] for element in figure.iter() if element.get("href")]
        targets += re.findall(r"url\(#([^)]*)\)", chart)
        assert targets and set(targets) <= set(ids)
        for drawing in drawings:
            # Every value has its shape and number for the pointer; text is text.
            marks = drawing.findall(".//g[@class='mark']")
            numbers = [number for mark in marks for number in re.findall(r"\d\.\d{3}\b", mark.findtext("title"))]
            assert len(marks) >= 9 and len(numbers) >= len(marks)
            assert any("parameters" in text.text for text in drawing.iter("text"))
        # No color is fixed but that of arrows and of what is not in the page's palette.
        assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", chart)) <= {
            *(f"var(--{name})" for name in ("ink", "soft", "grid", "random")), "none", "#666666", "#000000",
            *(f"var(--series-{number})" for number in range(1, 7)),
        }  # fmt: skip


def test_labels_of_near_anchors_lie_apart(figures, tmp_path):
    report = made_up()
    near = {**report["anchors"][0], "name": "instruct-v2-of-its-own", "num_parameters": 131_000_000}
    report["anchors"].insert(1, near)
    plot_sweep(report, tmp_path / "loss", formats=["png"])
    # Saving left the extents of another resolution.
    figures[0].draw_without_rendering()
    axes = figures[0].axes[-1]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 4
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
        assert axes.bbox.x0 - 1 <= box.x0 and box.x1 <= axes.bbox.x1 + 1


def test_names_with_characters_that_xml_lacks_are_drawn():
    report = made_up("a\x00b\x1b")
    report["anchors"][0]["name"] = "c\x00$d$"
    assert "a?b?" in comparison_chart([report, made_up("$\\frac{1$")], "loss")
    assert "c?$d$" in loss_chart(report, loss_axis([report]))


def test_picture_without_high_losses_has_no_strip(figures, tmp_path):
    report = copy.deepcopy(REPORT)
    for entry in [*report["anchors"], *report["targets"]]:
        entry["num_parameters"] //= 10_000
    for target in report["targets"]:
        target["loss"] = {"nested": target["loss"]["nested"]}
    plot_sweep(report, tmp_path / "loss.png", formats=["png"])
    (axes,) = figures[0].axes
    assert "10k" in [tick.get_text() for tick in axes.get_xticklabels()]


def test_infinite_losses_are_drawn_above_the_axis(figures, tmp_path):
    report = copy.deepcopy(REPORT)
    report["targets"][0]["loss"]["linear"] = math.inf
    report["targets"][0]["loss"]["slice"] = math.nan
    plot_sweep(report, tmp_path / "loss", formats=["png"])
    assert [text.get_text() for text in figures[0].axes[0].texts].count("∞") == 2


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no anchors, so there is nothing to draw"):
        plot_sweep({"anchors": [], "targets": []}, tmp_path / "loss")


def test_rows_are_sorted_by_size_and_name_the_best_operator():
    header, rows = table_rows(REPORT)
    assert header == ["parameters", "shape", "nested", "linear", "slice", "random", "seconds"]
    assert [row.cells[0] for row in rows] == ["135M", "110M", "85M", "60M", "44M"]
    assert [row.anchor for row in rows] == [True, False, True, False, True]
    assert rows[1].best == {2} and rows[3].best == {4}
    assert rows[1].cells[2:] == ["1.700", "9.500", "2.100", "10.800", "1.2"]
    assert all(len(row.cells) == len(header) for row in rows)


def test_measurements_table():
    lines = measurements_table(REPORT).splitlines()
    assert lines[1].startswith("| ---: | :--- | ---: |")
    assert lines[2].startswith("| **135M** | **135M (anchor): 30 layers, 576 wide, 9/3 heads** | **1.500** |")
    assert "| **1.700** | 9.500 |" in lines[3]
    assert {line.count("|") for line in lines} == {8}


def test_rich_table_fits_a_narrow_terminal(capsys):
    Console(width=80).print(sweep_table(REPORT, title="A chain"))
    shown = capsys.readouterr().out
    assert all(number in shown for number in ("1.700", "10.800", "135M"))


@pytest.mark.parametrize(
    ("count", "text"), [(135e6, "135M"), (1_235_814_400, "1.236B"), (48_544, "48.54k"), (512, "512")]
)
def test_format_count(count, text):
    assert format_count(count) == text


def test_describe_shape_in_both_families_words():
    assert describe_shape({**shape(16), "intermediate_size": 1024}) == "16 layers, 576 wide, 9/3 heads, ffn 1024"
    assert (
        describe_shape({"n_layer": 4, "n_embd": 32, "n_head": 4, "n_inner": 128})
        == "4 layers, 32 wide, 4 heads, ffn 128"
    )
