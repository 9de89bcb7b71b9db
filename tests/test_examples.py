"""The shipped example, run as a user runs it."""

import runpy
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_trl.cli_parsing import _Parser

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_pico_makes_the_whole_journey(tmp_path, capsys):
    runpy.run_path(str(EXAMPLES / "pico.py"))["main"](tmp_path)
    assert (tmp_path / "chain" / "chain.json").is_file()
    for name in ("small", "tuned"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tmp_path / name)
        assert model.config.hidden_size < 48
    assert "trained and saved" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["build", "distill"])
def test_every_key_of_the_yaml_files_is_a_flag(command):
    from trl import ModelConfig, ScriptArguments

    from cbd_trl import DistillConfig
    from cbd_trl.cli_arguments import BuildArguments

    own = {"build": BuildArguments, "distill": ModelConfig}[command]
    parser = _Parser([own, ScriptArguments, DistillConfig])
    keys = yaml.safe_load((EXAMPLES / f"{command}.yaml").read_text())
    assert {f"--{key}" for key in keys} <= set(parser.known_flags())
