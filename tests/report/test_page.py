"""The page as text: it loads nothing, means nothing but what it is given, and says what the numbers say."""

import json
import math
import shutil
from html.parser import HTMLParser

import pytest
from PIL import Image

from cbd_trl.report.findings import compare_chains, findings, on_line, shared_unit
from cbd_trl.report.page import render_page, write_report
from tests.report.conftest import QUICK, run
from tests.report.helpers import made_up, made_up_report

HOSTILE = "<img src=x onerror=alert(1)>&\"'[/red]$\\frac{1$ 数学"


class Elements(HTMLParser):
    """Every tag with its attributes, and the text between."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def assert_self_contained(text):
    elements = Elements(text)
    assert not elements.open
    assert not {tag for tag, _ in elements.tags} & {"script", "img", "iframe", "object", "embed", "base", "form", "a"}
    for tag, attributes in elements.tags:
        assert not any(name.startswith("on") or name in ("src", "srcset", "action") for name in attributes), tag
        assert not any(name.endswith(":href") for name in attributes), tag
        # A mark of a chart is drawn by what the chart itself defines.
        assert attributes.get("href", "data:").startswith("#" if tag == "use" else "data:")
    # A style sheet could load a font or a picture.
    styles = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in styles and "@import" not in styles
    [policy] = [each["content"] for tag, each in elements.tags if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_the_page_of_a_run_loads_nothing_and_holds_its_numbers(measured):
    text = (measured / "report.html").read_text(encoding="utf-8")
    assert_self_contained(text)
    [chain] = json.loads((measured / "report.json").read_text())["chains"]
    losses = [anchor["loss"] for anchor in chain["anchors"]]
    losses += [loss for target in chain["targets"] for loss in target["loss"].values()]
    cells = Elements(text).texts
    assert all(f"{loss:.3f}" in cells for loss in losses)
    assert f"{chain['text']['bytes']:,} bytes" in text


def test_hostile_names_are_text_everywhere(word_chain, words, tmp_path):
    name = HOSTILE.replace("/", "")
    chain = tmp_path / name
    shutil.copytree(word_chain, chain)
    flags = ["--data", words, "--operators", "nested", "--output", tmp_path / "out", *QUICK]
    code, shown, err = run(chain, "--compare", word_chain, *flags)
    assert code == 0, err
    # The terminal breaks lines where it likes.
    assert "".join(name.split()) in "".join(shown.split())
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert_self_contained(text)
    texts = Elements(text).texts
    assert f"{name}: held-out loss" in texts
    with Image.open(tmp_path / "out" / "report.png") as picture:
        picture.load()


def test_hostile_tasks_and_shapes_are_text(tmp_path):
    report = made_up(HOSTILE, task="</style><script>alert(1)</script>")
    for anchor in report["anchors"]:
        anchor["name"] = HOSTILE
    report |= {"path": HOSTILE, "revision": HOSTILE, "model_type": HOSTILE}
    assert_self_contained(render_page(made_up_report(report, data=HOSTILE)))


def test_a_loss_that_is_no_number_is_null_in_the_json_and_marked_on_the_chart(tmp_path):
    report = made_up()
    for target in report["targets"][:2]:
        target["loss"]["linear"] = math.nan
    write_report([report], tmp_path, "text.jsonl")
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["chains"][0]["targets"][0]["loss"]["linear"] is None
    shown = (tmp_path / "report.html").read_text()
    assert "linear nan" in shown and 'nan"' not in shown.replace("linear, nan", "")


def test_what_the_numbers_say():
    report = made_up()
    said = findings(report)
    assert said[0].startswith("The smallest anchor (44.21M, 33% of the source) is at 3.391 nats per token (1.309")
    assert said[1] == "nested has the lowest loss of all operators at 6 of 6 sizes."
    assert "at 6 of 6 sizes (worst: -0.020 nats)" in said[2]
    assert said[3] == (
        "Untrained models of these shapes are at 10.346 nats per token (3.993 bits per byte) to 10.876 nats per token "
        "(4.198 bits per byte)."
    )
    report["targets"][0]["loss"]["slice"] = 2.0
    report["targets"][1]["loss"]["nested"] += 0.12
    said = findings(report)
    assert said[1].endswith("at 4 of 6 sizes.") and "at 5 of 6 sizes (worst: +0.100 nats)" in said[2]


def test_two_chains_are_compared_where_both_reach():
    better, worse = made_up("better"), made_up("worse", worse=0.9)
    said = compare_chains([better, worse])
    # Eight of nine sizes are 0.9 higher, the source is the same.
    assert said.startswith("worse is ahead of better at 0 of the 9 sizes") and "0.800 nats per token above it" in said
    assert "at 8 of the 9 sizes" in compare_chains([worse, better]) and "below it" in compare_chains([worse, better])
    text = render_page(made_up_report(better, worse))
    assert_self_contained(text)
    assert "Side by side" in text and "better: held-out loss" in text and "worse: held-out loss" in text
    # One axis for both: the same loss stands equally high.
    assert text.count('aria-label="Held-out loss of better against size"') == 2
    for chain in (worse,):
        chain["anchors"] = [{**anchor, "num_parameters": 10 * anchor["num_parameters"]} for anchor in chain["anchors"]]
        chain["targets"] = []
    assert compare_chains([better, worse]) is None


def test_other_tokens_are_compared_in_bits_per_byte_or_not_at_all():
    one, other = made_up("one"), made_up("other", 0.5, tokenizer="b")
    assert shared_unit([one, made_up()]) == "loss" and shared_unit([one, other]) == "bits_per_byte"
    assert "bits per byte above it" in compare_chains([one, other])
    assert "in bits per byte: lower is better" in render_page(made_up_report(one, other))
    other["text"]["bytes"] = None
    assert shared_unit([one, other]) is None and compare_chains([one, other]) is None
    assert "their losses cannot be compared" in render_page(made_up_report(one, other))


def test_the_line_through_points():
    points = [(1.0, 4.0), (2.0, 2.0), (4.0, 0.0)]
    assert [on_line(points, x) for x in (1.0, 1.5, 2.0, 3.0, 4.0)] == [4.0, 3.0, 2.0, 1.0, 0.0]
    assert on_line(points, 0.5) is None and on_line(points, 5.0) is None and on_line([], 1.0) is None
    assert on_line([(1.0, 3.0)], 1.0) == 3.0
