"""The page in a real browser without a window: what it complains of, and what is to be seen."""

import html
import json
import re
import shutil
import subprocess
from collections import Counter

import pytest
from PIL import Image

from cbd_trl.report.page import render_page
from tests.report.helpers import made_up, made_up_report

_BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
_FLAGS += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
_FLAGS += ["--enable-logging=stderr"]
pytestmark = pytest.mark.skipif(_BROWSER is None, reason="there is no chromium or google-chrome on the PATH")

# Colors of the page's light style: nested, linear, slice, expand, anchors.
_COLOURS = [(0x00, 0x72, 0xB2), (0xC4, 0x51, 0x0A), (0x00, 0x81, 0x5F), (0xB2, 0x56, 0x8F), (0x16, 0x19, 0x1D)]
# Tells where everything is that is shown, in the document's title's place: the page itself may run no script.
_PROBE = """<script>
const shown = [...document.querySelectorAll("svg[role=img]")].filter(each => each.getBoundingClientRect().width);
const box = each => { const b = each.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
const told = shown.map(chart => ({
  name: chart.getAttribute("aria-label"), section: box(chart.closest("section")), chart: box(chart),
  marks: [...chart.querySelectorAll(".mark use")].map(box),
  texts: [...chart.querySelectorAll("text")].map(each => [each.textContent, ...box(each)]),
  scale: chart.getBoundingClientRect().width / chart.viewBox.baseVal.width,
}));
const page = [document.documentElement.scrollWidth, innerWidth];
document.body.dataset.told = JSON.stringify({charts: told, page});
</script>"""


def browse(folder, file, *flags):
    """What the browser printed, and what it complained of on its console."""
    command = [_BROWSER, *_FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


def told(folder, text, width):
    """Where everything is, of a window of this width (at least what the browser allows)."""
    file = folder / "probed.html"
    unlocked, locks = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert locks == 1
    file.write_text(unlocked.replace("</body>", f"{_PROBE}</body>"), encoding="utf-8")
    shown, _ = browse(folder, file, "--dump-dom", f"--window-size={width},1000")
    return json.loads(html.unescape(re.search(r'data-told="([^"]*)"', shown)[1]))


def overlap(one, other):
    """Do two texts lie on each other? Their boxes have 3 pixels above and below the letters."""
    return one[0] < other[2] and other[0] < one[2] and one[1] + 3 < other[3] - 3 and other[1] + 3 < one[3] - 3


def test_charts_are_drawn_and_the_console_is_silent(measured, tmp_path):
    picture = tmp_path / "page.png"
    flags = [f"--screenshot={picture}", "--window-size=1100,1400"]
    _, complaints = browse(tmp_path, measured / "report.html", *flags)
    assert complaints == []
    with Image.open(picture) as image:
        colors = Counter(image.convert("RGB").crop((60, 100, 1040, 760)).get_flattened_data())
    for color in _COLOURS:
        assert colors[color] > 40, f"{color} is hardly to be seen"


def test_the_console_would_be_heard_and_nothing_is_loaded(measured, tmp_path):
    file, picture = tmp_path / "page.html", '<img src="data:image/png;base64,x"><script>1</script>'
    file.write_text((measured / "report.html").read_text().replace("</main>", f"{picture}</main>"))
    _, complaints = browse(tmp_path, file, "--dump-dom")
    assert any("Content Security Policy" in complaint for complaint in complaints)


@pytest.mark.parametrize(("width", "chains"), [(1500, 2), (1100, 1), (500, 2)])
def test_labels_are_legible_and_apart(tmp_path, width, chains):
    long = "a-chain-with-a-rather-long-name-of-its-own"
    reports = [made_up(task="hellaswag"), made_up(long, 0.15, task="hellaswag")][:chains]
    for report in reports:
        # Anchors close to each other in both directions, and one with a long name.
        near = {**report["anchors"][0], "name": "instruct-v2-of-its-own", "num_parameters": 131_000_000}
        report["anchors"].insert(1, near)
    found = told(tmp_path, render_page(made_up_report(*reports)), width)
    assert len(found["charts"]) == (2 if chains == 1 else 5)
    assert found["page"][0] <= found["page"][1], "the page is wider than the window"
    for chart in found["charts"]:
        left, _, right, _ = chart["section"]
        assert chart["chart"][2] - chart["chart"][0] > 300 and 0.85 <= chart["scale"] <= 1.35, chart["name"]
        assert len(chart["marks"]) >= 9
        for what, *box in chart["texts"]:
            assert left <= box[0] and box[2] <= right, f"{what} reaches out of its card"
        for number, (what, *box) in enumerate(chart["texts"]):
            for other, *place in chart["texts"][number + 1 :]:
                assert not overlap(box, place), f"{what} and {other} lie on each other in {chart['name']}"
