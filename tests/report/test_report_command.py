"""`cbd-trl report`: its numbers against numbers computed here, and what a second run measures."""

import json
import math

import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_trl import Chain, from_chain
from cbd_trl.report import measure as chain_report
from tests.report.conftest import QUICK, report_of, run


@pytest.fixture(scope="module")
def chain(byte_chain):
    return Chain.from_pretrained(byte_chain)


@pytest.fixture(scope="module")
def blocks(byte_chain, texts):
    """The first 3 x 24 tokens, cut here."""
    tokenizer = AutoTokenizer.from_pretrained(Chain.from_pretrained(byte_chain).anchors[0].path)
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(ids[: 3 * 24]).view(3, 24)


def loss_of(model, blocks):
    with torch.no_grad():
        logits = model(input_ids=blocks).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).item()


def without_times(report):
    """The same without the seconds."""
    if isinstance(report, dict):
        return {key: without_times(value) for key, value in report.items() if "seconds" not in key}
    return [without_times(each) for each in report] if isinstance(report, list) else report


def test_anchors_have_the_loss_and_the_bits_per_byte_computed_here(measured, chain, blocks):
    [report] = report_of(measured)["chains"]
    tokenizer = AutoTokenizer.from_pretrained(chain.anchors[0].path)
    # The alphabet of byte-level BPE has a letter for a byte; special tokens are no text.
    spelled = tokenizer.convert_ids_to_tokens(blocks[:, 1:].flatten().tolist())
    num_bytes = sum(len(token) for token in spelled if token not in tokenizer.all_special_tokens)
    assert num_bytes > blocks[:, 1:].numel()
    assert report["text"] == {"blocks": 3, "block_length": 24, "start": [], "tokens": 69, "bytes": num_bytes}
    assert [entry["name"] for entry in report["anchors"]] == [anchor.name for anchor in chain.anchors]
    for entry, anchor in zip(report["anchors"], chain.anchors, strict=True):
        model = AutoModelForCausalLM.from_pretrained(anchor.path, dtype=torch.float32)
        loss = loss_of(model, blocks)
        assert entry["loss"] == pytest.approx(loss, rel=1e-4)
        assert entry["bits_per_byte"] == pytest.approx(loss * 69 / math.log(2) / num_bytes, rel=1e-4)
        assert entry["num_parameters"] == model.num_parameters()


def test_sizes_and_controls_are_those_that_from_chain_makes(measured, chain, blocks):
    [report] = report_of(measured)["chains"]
    sizes = sorted(anchor.num_parameters for anchor in chain.anchors)
    assert len(report["targets"]) >= 3
    for target in report["targets"]:
        assert list(target["loss"]) == ["nested", "linear", "slice", "expand", "random"]
        assert sizes[0] < target["num_parameters"] < sizes[-1] and target["num_parameters"] not in sizes
        bits = report["anchors"][0]["bits_per_byte"] / report["anchors"][0]["loss"]
        for name, loss in target["loss"].items():
            assert target["bits_per_byte"][name] == pytest.approx(loss * bits)
    for target in (report["targets"][0], report["targets"][-1]):
        losses = {}
        for operator in ("nested", "linear", "slice", "expand"):
            model = from_chain(chain, config=target["shape"], operator=operator)
            losses[operator] = loss_of(model, blocks)
            assert target["loss"][operator] == pytest.approx(losses[operator], rel=1e-4)
        assert len({round(loss, 4) for loss in losses.values()}) == 4
        torch.manual_seed(0)
        random = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype).eval()
        assert target["loss"]["random"] == pytest.approx(loss_of(random, blocks), rel=1e-4)
    # Growing leaves the function as it is, so that control is the anchor below it.
    assert report["targets"][-1]["loss"]["expand"] == pytest.approx(report["anchors"][-1]["loss"], rel=1e-3)


def test_the_files_and_what_is_shown(byte_chain, held_out, measured):
    assert sorted(file.name for file in measured.iterdir()) == [
        "report.html",
        "report.json",
        "report.png",
        "results.json",
    ]
    with Image.open(measured / "report.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
        assert len(picture.convert("RGB").getcolors(maxcolors=10**6)) > 50
    code, shown, _ = run(byte_chain, "--data", held_out, "--output", measured, *QUICK)
    assert code == 0
    [report] = report_of(measured)["chains"]
    shown = " ".join(shown.split())
    assert "byte-chain" in shown and "The smallest anchor" in shown and "report.png" in shown
    for entry in report["anchors"]:
        assert f"{entry['loss']:.3f}" in shown


def count_losses(monkeypatch, stop_at=None):
    """Counts the measurements; the one of this number is interrupted."""
    measured = []
    original = chain_report.held_out_loss

    def counted(*args):
        measured.append(args)
        if len(measured) == stop_at:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(chain_report, "held_out_loss", counted)
    return measured


def test_an_interrupted_run_goes_on_where_it_was(byte_chain, held_out, measured, tmp_path, monkeypatch):
    flags = [byte_chain, "--data", held_out, "--output", tmp_path, *QUICK]
    first = count_losses(monkeypatch, stop_at=6)
    code, _, err = run(*flags)
    assert code == 130 and "the same command goes on" in err
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    monkeypatch.undo()
    second = count_losses(monkeypatch)
    assert run(*flags)[0] == 0
    [report] = report_of(measured)["chains"]
    models = len(report["anchors"]) + sum(len(target["loss"]) for target in report["targets"])
    assert len(first) - 1 + len(second) == models
    assert without_times(report_of(tmp_path)) == without_times(report_of(measured))
    # Done, it measures nothing; other text is other work.
    second.clear()
    assert run(*flags)[0] == 0 and not second
    assert run(*flags, "--operators", "nested", "--blocks", "2")[0] == 0 and len(second) == 3 + len(report["targets"])


def test_sizes_operators_and_seed_are_those_asked_for(byte_chain, chain, held_out, tmp_path):
    upper, lower = (anchor.num_parameters for anchor in chain.anchors[:2])
    size = (upper + lower) // 2
    flags = [byte_chain, "--data", held_out, *QUICK, "--sizes", size, "--tolerance", "0.1"]
    flags += ["--operators", "nested,patch,random"]
    reports = []
    for seed in (0, 1):
        assert run(*flags, "--output", tmp_path / str(seed), "--seed", seed)[0] == 0
        reports.append(report_of(tmp_path / str(seed))["chains"][0])
    [target] = reports[0]["targets"]
    assert abs(target["num_parameters"] / size - 1) <= 0.1
    assert list(target["loss"]) == ["nested", "patch", "random"]
    assert reports[0]["anchors"][0]["loss"] == reports[1]["anchors"][0]["loss"]
    assert target["loss"]["random"] != reports[1]["targets"][0]["loss"]["random"]


def test_patch_makes_no_widths_and_is_left_out_there(byte_chain, held_out, tmp_path):
    flags = ["--operators", "nested,patch", "--output", tmp_path, *QUICK]
    assert run(byte_chain, "--data", held_out, *flags)[0] == 0
    [report] = report_of(tmp_path)["chains"]
    width = report["anchors"][0]["shape"]["hidden_size"]
    for target in report["targets"]:
        assert ("patch" in target["loss"]) == (target["shape"]["hidden_size"] == width)
    assert {len(target["loss"]) for target in report["targets"]} == {1, 2}


def test_a_column_of_another_name_and_tokens_that_do_not_tell_their_bytes(word_chain, tmp_path):
    rows = [{"body": f"w{i} w{i + 1} w{i + 2} w{i + 3}"} for i in range(40)]
    plain, named = tmp_path / "text.jsonl", tmp_path / "body.jsonl"
    named.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain.write_text("".join(json.dumps({"text": row["body"]}) + "\n" for row in rows))
    found = []
    for flags in (["--data", plain], ["--data", named, "--text_column", "body"]):
        folder = tmp_path / str(len(found))
        assert run(word_chain, *flags, "--operators", "nested", "--output", folder, *QUICK)[0] == 0
        found.append(report_of(folder)["chains"][0])
    assert without_times(found[0]) == without_times(found[1])
    # Words that were split at white space do not tell how much of it there was.
    assert found[0]["text"]["bytes"] is None and found[0]["anchors"][0]["bits_per_byte"] is None
