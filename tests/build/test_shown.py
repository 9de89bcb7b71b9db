"""What a build shows of its phases where there is no terminal."""

import pytest
from datasets import concatenate_datasets

from cbd_trl import build_chain
from cbd_trl.utils.progress import Ticker
from tests.chain.helpers import chain_config, chain_rows, depth_of
from tests.surgery.helpers import full_model
from tests.tokenizer import tiny_tokenizer

PHASES = {
    "Collecting statistics",
    "Ranking the coordinates",
    "Computing the weights",
    "Factorizing the statistics",
    "Hashing files",
    "Choosing layers",
    "Recording the layers to refit",
    "Refitting layers",
    "Checking files",
}


@pytest.mark.parametrize("silent", [False, True])
def test_every_phase_of_a_build_is_shown_unless_disable_tqdm_says_no(silent, tmp_path, capsys, monkeypatch):
    # As if every step took long.
    monkeypatch.setattr(Ticker, "due", lambda self: True)
    source = full_model("llama", tied=False, **depth_of("llama", 6)).float()
    args = chain_config(max_steps=2, save_strategy="no", disable_tqdm=silent, logging_steps=100)
    how = {
        "dataset": concatenate_datasets([chain_rows()] * 8),
        "args": args,
        "processing_class": tiny_tokenizer(),
        "calibration_tokens": 512,
    }
    capsys.readouterr()
    build_chain(source, [depth_of("llama", 4)], output_dir=tmp_path / "chain", **how)
    said = capsys.readouterr()
    # Other libraries have bars of their own there.
    lines = [line for line in said.err.splitlines() if "\r" not in line]
    assert {phase for phase in PHASES if any(line.startswith(f"{phase}: ") for line in lines)} == (
        set() if silent else PHASES
    )
    assert any("· step 1/2 ·" in line for line in said.out.splitlines()) != silent
