"""The picture of loss against size, where something was measured; and cards that are kept or rewritten."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from cbd_trl import Chain, from_chain
from cbd_trl.architectures import describe
from cbd_trl.chain.cards import _example_size
from cbd_trl.chain.measurements import MEASURED
from cbd_trl.cli.main import main
from cbd_trl.report.page import save_measurements
from tests.cards.helpers import metadata, read
from tests.chain.helpers import DEEP, chain_rows
from tests.tiny import tiny_model

# How the Hub's client sends a file is on its way out in its HTTP library; neither is ours.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
PICTURE = "loss-against-size.png"
SHOWN = f"![Held-out loss against the number of parameters]({PICTURE})"


def report_of(chain):
    anchors = [
        {"name": anchor.name, "num_parameters": anchor.num_parameters, "shape": anchor.shape, "loss": 3.0 + number}
        for number, anchor in enumerate(chain.anchors)
    ]
    between = {"num_parameters": chain.anchors[1].num_parameters + 99, "shape": chain.anchors[1].shape}
    return {"anchors": anchors, "targets": [{**between, "seconds": 0.5, "loss": {"nested": 3.4567}}]}


@pytest.fixture(scope="module")
def measured(chain, tmp_path_factory):
    """A copy of the chain with what was measured of it; not to be changed."""
    folder = tmp_path_factory.mktemp("measured") / "chain"
    chain.save_pretrained(folder)
    copy = Chain.from_pretrained(folder)
    save_measurements(copy, report_of(copy))
    return copy


def assert_shown(folder):
    assert SHOWN in read(folder)
    metadata(read(folder))
    with Image.open(folder / PICTURE) as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(10**6)) > 20


def test_the_picture_is_on_all_cards(measured, tmp_path):
    from_chain(measured, config=DEEP, save_directory=tmp_path / "target")
    for folder in (measured.path, *(anchor.path for anchor in measured.anchors), tmp_path / "target"):
        assert_shown(folder)
    assert "## Measured" in read(measured.path) and "| 3.457 |" in read(measured.path).replace("*", "")
    assert json.loads((measured.path / MEASURED).read_text()) == report_of(measured)
    # Nor does the chain become another by it.
    assert Chain.from_pretrained(measured.path).checksum == measured.checksum


def test_without_measurements_there_is_none(chain, tmp_path):
    from_chain(chain, config=DEEP, save_directory=tmp_path / "target")
    for folder in (chain.path, *(anchor.path for anchor in chain.anchors), tmp_path / "target"):
        assert PICTURE not in read(folder) and not (folder / PICTURE).exists()


def test_where_the_chain_lies_here_is_not_kept(chain, tmp_path):
    chain.save_pretrained(tmp_path / "copy")
    copy = Chain.from_pretrained(tmp_path / "copy")
    save_measurements(copy, {**report_of(copy), "name": f"{copy.path} (1)", "path": str(copy.path), "revision": None})
    kept = (copy.path / MEASURED).read_text()
    assert str(tmp_path) not in kept and "path" not in json.loads(kept)
    assert json.loads(kept)["name"] == "copy (1)"
    save_measurements(copy, {**report_of(copy), "path": "me/chain", "revision": "0" * 40})
    assert json.loads((copy.path / MEASURED).read_text())["path"] == "me/chain"


def test_it_goes_to_the_hub_and_away_with_the_chain(hub, chain, measured, tmp_path):
    measured.push_to_hub("me/pushed")
    files = hub.files("me/pushed")
    for folder in ("", *(f"{anchor.name}/" for anchor in measured.anchors)):
        assert SHOWN in files[f"{folder}README.md"].decode()
        assert files[f"{folder}{PICTURE}"] == (measured.path / PICTURE).read_bytes()
    assert MEASURED in files
    from_chain("me/pushed", config=DEEP, save_directory=tmp_path / "target")
    assert_shown(tmp_path / "target")
    chain.push_to_hub("me/pushed")
    left = set(hub.files("me/pushed"))
    assert MEASURED not in left and not any(name.endswith(PICTURE) for name in left)


def test_it_goes_into_repositories_of_the_anchors(hub, measured):
    measured.push_to_hub("me/pushed", own_repos=True)
    files = hub.files(f"me/pushed-{measured.anchors[1].name}")
    assert SHOWN in files["README.md"].decode() and PICTURE in files


def test_a_copy_has_it_and_not_that_of_another_chain(chain, measured, tmp_path):
    measured.save_pretrained(tmp_path / "copy")
    assert_shown(tmp_path / "copy")
    chain.save_pretrained(tmp_path / "copy")
    assert PICTURE not in read(tmp_path / "copy") and not (tmp_path / "copy" / PICTURE).exists()


def test_report_puts_it_on_the_cards(chain, tmp_path, capsys):
    chain.save_pretrained(tmp_path / "chain")
    chain_rows(40, seed=5).to_json(tmp_path / "held.jsonl")
    flags = ["--data", str(tmp_path / "held.jsonl"), "--output", str(tmp_path / "report"), "--blocks", "2"]
    flags += ["--block_length", "16", "--operators", "nested"]
    assert main(["report", str(tmp_path / "chain"), *flags, "--cards"]) == 0
    assert_shown(tmp_path / "chain")
    assert "## Measured" in read(tmp_path / "chain")
    capsys.readouterr()


def test_report_has_no_cards_to_write_on_the_hub(hub, chain, tmp_path, capsys):
    hub.commit("me/chain", chain.path, "main")
    chain_rows(40, seed=5).to_json(tmp_path / "held.jsonl")
    assert main(["report", "me/chain", "--data", str(tmp_path / "held.jsonl"), "--cards"]) == 1
    assert "--cards writes into the chain's folder, and me/chain is on the Hub" in capsys.readouterr().err


def test_cards_are_rewritten_until_somebody_edits_one(measured, tmp_path):
    measured.save_pretrained(tmp_path / "copy")
    measured, before = Chain.from_pretrained(tmp_path / "copy"), read(measured.path)
    report = report_of(measured)
    report["anchors"][0]["loss"] = 1.25
    save_measurements(measured, report)
    assert "1.250" in read(measured.path) and "1.250" not in before
    edited = read(measured.path).replace("seconds, without", "seconds (mine), without")
    assert edited != read(measured.path)
    (measured.path / "README.md").write_text(edited)
    save_measurements(measured, report_of(measured))
    assert read(measured.path) == edited
    assert "1.250" not in read(measured.anchors[0].path)


@pytest.mark.parametrize(
    ("module", "what"), [("cbd_trl.chain.cards", "cards"), ("cbd_trl.report.page", "measurements")]
)
def test_a_full_disk_is_a_warning(measured, tmp_path, monkeypatch, module, what):
    measured.save_pretrained(tmp_path / "copy")
    measured, warnings = Chain.from_pretrained(tmp_path / "copy"), []

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("cbd_trl.cards.card.write_text" if what == "cards" else f"{module}.write_text", full)
    monkeypatch.setattr(f"{module}.logger", SimpleNamespace(warning=warnings.append))
    report = report_of(measured)
    report["anchors"][0]["loss"] = 1.5
    save_measurements(measured, report)
    [warning] = warnings
    assert what in warning and "No space left on device" in warning


@pytest.mark.parametrize(("upper", "lower"), [(6, 5), (6, 4), (6, 3)])
def test_the_size_that_a_card_asks_for_can_be_made(upper, lower):
    """Between 6 and 5 layers there is no other depth."""
    from cbd_trl.shapes.solve import solve_target
    from cbd_trl.surgery.blocks import blocks_of, spaced_layers

    above, below = (describe(tiny_model("llama", num_hidden_layers=layers).config) for layers in (upper, lower))
    blocks = blocks_of(spaced_layers(upper, lower))
    anchors = [
        SimpleNamespace(
            architecture=lambda one=one: one, num_parameters=one.num_parameters, block_map=blocks, kept_layers=None
        )
        for one in (above, below)
    ]
    size = _example_size(anchors)
    assert solve_target(above, below, blocks, size)
    assert below.num_parameters <= size <= above.num_parameters
