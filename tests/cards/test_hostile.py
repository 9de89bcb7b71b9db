"""Words from a manifest that somebody else wrote stay words: no Markdown, no HTML, no metadata come of them."""

import json
import re

import pytest

from cbd_trl import Chain, from_chain
from cbd_trl.cards.card import code, plain
from cbd_trl.chain.cards import anchor_card, chain_card, save_cards
from cbd_trl.chain.manifest import read_manifest, write_manifest
from cbd_trl.chain.measurements import MEASURED
from tests.cards.helpers import as_html, metadata, read
from tests.chain.helpers import DEEP

HOSTILE = [
    "<script>alert(1)</script>",
    "![i](https://evil.example/x.png)",
    "[c](https://evil.example)",
    "https://evil.example",
    "WWW.evil.example",
    "<img src=https://evil.example>",
    "` <script>alert(1)</script> `",
    "a | b | <script>alert(1)</script>",
    "x\n---\nlicense: mit\n---\n# evil\n",
    "x\r\n\r\n<script>alert(1)</script>\r\n",
    "```\n<script>alert(1)</script>\n```",
    "</details><script>alert(1)</script>",
    "{{ 7 * 191 }}{% raw %}",
    "",
]


HEADINGS = {"Anchors", "Measured", "Losses at the end of the training", "Parameters", "How to use it", "License"}


def assert_harmless(text: str) -> None:
    html = as_html(text)
    assert "<script" not in html and "<img" not in html and "1337" not in html
    assert "evil" not in " ".join(re.findall(r'(?:href|src)="([^"]*)"', html))
    # Nor what GitHub would make a link of by itself, outside of code.
    prose = re.sub(r"<code.*?</code>", "", html, flags=re.DOTALL)
    assert not re.search(r"(https?://|www\.)evil", prose, re.IGNORECASE)
    headings = re.findall(r"<h\d>(.*?)</h\d>", html)
    assert {"How to use it", "License"} <= set(headings[1:]) <= HEADINGS
    for table in re.findall(r"<table>.*?</table>", html, re.DOTALL):
        columns = [row.count("<td") + row.count("<th") for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)]
        assert len(columns) > 1 and len(set(columns)) == 1


@pytest.mark.parametrize("words", HOSTILE)
def test_words_are_made_harmless(words):
    for text in (f"{plain(words)} and {code(words)}", f"# {plain(words)}", f"| {plain(words)} | {code(words)} |"):
        assert "\n" not in text and "\r" not in text
        html = as_html("---\n---\n" + text)
        assert "<script" not in html and "<img" not in html and "href" not in html
    assert not re.search(r"(https?:|www\.)", plain(words), re.IGNORECASE)


@pytest.fixture
def hostile(chain, tmp_path):
    """A copy of the chain, these words wherever its manifest takes any."""
    chain.save_pretrained(tmp_path / "copy")
    origins = [
        {
            **dict.fromkeys(("name", "revision", "license", "license_name", "license_link"), words),
            "base_models": [words],
        }
        for words in HOSTILE
    ]
    told = dict(zip(HOSTILE, HOSTILE, strict=True))
    losses = {"loss": 1.0, **dict.fromkeys(HOSTILE, 2.0), **{f"eval_{words}_loss": 3.0 for words in HOSTILE}}
    training = {
        "origins": [*HOSTILE, *origins, {"base_models": ["org/good"]}],
        "datasets": [*HOSTILE, "org/rows"],
        **told,
    }
    manifest = read_manifest(tmp_path / "copy")
    anchors = [anchor.model_copy(update={"losses": losses, "training": training}) for anchor in manifest.anchors]
    anchors[1] = anchors[1].model_copy(update={"training": {"aligned": True, "match": told}})
    record = {"values": told, "non_default": HOSTILE, "versions": told}
    anchors[2] = anchors[2].model_copy(update={"training": {"bridge": {"arguments": record}}})
    versions = {words: f"1{words}" for words in HOSTILE}
    changed = manifest.model_copy(update={"versions": versions, "anchors": anchors})
    write_manifest(tmp_path / "copy", changed)
    return Chain.from_pretrained(tmp_path / "copy")


def test_a_hostile_manifest_makes_harmless_cards(hostile, tmp_path):
    save_cards(hostile)
    from_chain(hostile, config=DEEP, save_directory=tmp_path / "target")
    for folder in (hostile.path, *(anchor.path for anchor in hostile.anchors), tmp_path / "target"):
        data = metadata(read(folder))
        assert not {"license", "license_name", "license_link"} & data.keys()
        # One of the words has the form of an id.
        assert data["base_model"] == ["WWW.evil.example", "org/good"]
        assert data.get("datasets", ["org/rows"])[-1] == "org/rows"
        assert_harmless(read(folder))


def test_hostile_measurements_make_harmless_cards(chain, tmp_path):
    chain.save_pretrained(tmp_path / "copy")
    entries = [{"name": words, "num_parameters": 9, "shape": {words: 3}, "loss": 1.0} for words in HOSTILE]
    target = {"num_parameters": 8, "shape": {"x": 2}, "seconds": 1.0, "loss": dict.fromkeys(HOSTILE, 2.0)}
    (tmp_path / "copy" / MEASURED).write_text(json.dumps({"anchors": entries, "targets": [target]}))
    save_cards(Chain.from_pretrained(tmp_path / "copy"))
    assert "## Measured" in read(tmp_path / "copy")
    assert_harmless(read(tmp_path / "copy"))


NO_REPORTS = ["", "nonsense", "[]", "3", "null", '{"anchors": 3}', '{"anchors": [{}], "targets": []}', "[" * 10**5]


def test_measurements_that_are_none_are_left_out(chain, tmp_path):
    chain.save_pretrained(tmp_path / "copy")
    copy = Chain.from_pretrained(tmp_path / "copy")
    for content in NO_REPORTS:
        (tmp_path / "copy" / MEASURED).write_text(content)
        assert "## Measured" not in chain_card(copy)


@pytest.mark.parametrize(
    "told", [{"aligned": True, "match": ["x"]}, {"bridge": {"arguments": "x"}}, {"datasets": "x"}, {"origins": "x"}]
)
def test_records_of_other_types_are_no_error(chain, told):
    metadata(anchor_card(chain, chain.anchors[0].model_copy(update={"training": told})))
