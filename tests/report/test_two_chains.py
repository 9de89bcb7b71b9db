"""Two chains in one report."""

from cbd_trl import Chain
from tests.report.conftest import QUICK, report_of, run


def test_two_chains_of_the_same_tokens_and_one_of_others(byte_chain, word_chain, held_out, tmp_path):
    flags = ["--data", held_out, "--operators", "nested", *QUICK]
    code, shown, err = run(byte_chain, "--compare", word_chain, "--output", tmp_path / "others", *flags)
    assert code == 0, err
    report = report_of(tmp_path / "others")
    assert [chain["name"] for chain in report["chains"]] == ["byte-chain", "word-chain"]
    # Each reads the text in its own tokens; words do not tell their bytes, so nothing is compared.
    assert [chain["text"]["bytes"] is None for chain in report["chains"]] == [False, True]
    assert "is ahead of" not in shown
    assert "their losses cannot be compared" in (tmp_path / "others" / "report.html").read_text()

    code, shown, err = run(byte_chain, "--compare", byte_chain, "--output", tmp_path / "same", *flags)
    assert code == 0, err
    first, second = report_of(tmp_path / "same")["chains"]
    assert first["name"] != second["name"] and first["anchors"] == second["anchors"]
    assert "ahead of" in " ".join(shown.split()) and "at 0 of the" in " ".join(shown.split())


def test_a_size_outside_one_chain_is_left_to_the_other(byte_chain, word_chain, held_out, tmp_path):
    smallest = [Chain.from_pretrained(folder).anchors[-1].num_parameters for folder in (byte_chain, word_chain)]
    largest = [Chain.from_pretrained(folder).anchors[0].num_parameters for folder in (byte_chain, word_chain)]
    assert smallest[1] < 0.9 * smallest[0] and largest[1] < 0.9 * largest[0]
    flags = ["--data", held_out, "--operators", "nested", "--tolerance", "0.02", *QUICK]
    flags += ["--sizes", f"{smallest[1]},{largest[0]}", "--output", tmp_path]
    code, _, err = run(byte_chain, "--compare", word_chain, *flags)
    assert code == 0, err
    sizes = [[target["num_parameters"] for target in chain["targets"]] for chain in report_of(tmp_path)["chains"]]
    assert sizes == [[largest[0]], [smallest[1]]]
