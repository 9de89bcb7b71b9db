"""The recipes that come with the package: each is parsed, and planned for the published dimensions of its source."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen3Config

from cbd_trl.architectures import describe
from cbd_trl.build.plan import Given
from cbd_trl.chain.source import Source
from cbd_trl.cli.main import main
from cbd_trl.demo.run import ANSWER_TOKENS, Settings, default_steps
from cbd_trl.recipe.check import Check, how_estimated, plan_costs, recipe_table
from cbd_trl.recipe.configs import anchor_args, bridge_args
from cbd_trl.recipe.estimate import Speed, smallest_gpu, writing_seconds
from cbd_trl.recipe.schema import read_recipe, shipped_recipes
from tests.public_configs import CONFIGS, save_config
from tests.tokenizer import tiny_tokenizer

SMOLLM2_CONFIG = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
GPT2_XL = GPT2Config(n_layer=48, n_embd=1600, n_head=25)
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
# The largest anchor of each, as published: anchor zero where there is a bridge.
HEADS: dict[str, Any] = {
    "demo": SMOLLM2_CONFIG,
    "smollm2-135m": SMOLLM2_CONFIG,
    "gpt2-xl": GPT2_XL,
    "llama-3-8b": GPT2_XL,
    "pythia-1b": GPTNeoXConfig(
        vocab_size=50304, hidden_size=2048, num_hidden_layers=16, num_attention_heads=8, intermediate_size=8192
    ),
    "gpt2-xl-public": CONFIGS["openai-community/gpt2-xl"],
    "pythia-410m-public": CONFIGS["EleutherAI/pythia-410m"],
    "qwen3-1.7b-public": CONFIGS["Qwen/Qwen3-1.7B"],
    "gemma-3-1b-public": CONFIGS["google/gemma-3-1b-pt"],
    "smollm2-360m-public": CONFIGS["HuggingFaceTB/SmolLM2-360M"],
    "qwen3-4b": Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=9728,
        tie_word_embeddings=True,
    ),
}
# Of every anchor, in millions of parameters, largest first.
MILLIONS = {
    "demo": [135, 85, 44],
    "smollm2-135m": [135, 85, 44],
    "gpt2-xl": [1558, 774, 355, 124],
    "llama-3-8b": [1558, 774, 355, 124],
    "pythia-1b": [1012, 404, 162, 70],
    "qwen3-4b": [4022, 1721, 596],
    "gpt2-xl-public": [1558, 774, 355, 124],
    "pythia-410m-public": [405, 162, 70],
    "qwen3-1.7b-public": [1721, 596],
    "gemma-3-1b-public": [1000, 268],
    "smollm2-360m-public": [362, 135],
}
PUBLIC = sorted(name for name in HEADS if name.endswith("-public"))


def _in_folders(name: str, folder: Path) -> list[str]:
    """Changes of a recipe to models that are here, as far as their configs."""
    recipe, here = read_recipe(name), []
    for number, anchor in enumerate(recipe.anchors):
        if anchor.model is not None:
            here.append(f"anchors[{number}].model={save_config(anchor.model, folder)}")
    if here:
        assert recipe.source is not None
        here.append(f"source={save_config(recipe.source.name, folder)}")
    return here


def _planned(name: str, folder: Path, changes: Sequence[str] = ()) -> Check:
    changes = [*changes, *_in_folders(name, folder)]
    recipe = read_recipe(name, changes)
    check = Check(recipe, list(recipe.problems), args=anchor_args(recipe, {}))
    if recipe.bridge is not None:
        check.bridge = bridge_args(recipe, recipe.bridge.args)
    given = None
    if name in PUBLIC and recipe.source is not None:
        source = Source(recipe.source.name)
        given = Given(source.tokenizer_or(None), None, [source])
    plan_costs(check, describe(HEADS[name]), given, LLAMA_3_8B if recipe.bridge is not None else None)
    # Their folders are without weights.
    check.problems = [problem for problem in check.problems if "has no model.safetensors" not in problem]
    return check


def test_every_recipe_is_tested() -> None:
    assert set(shipped_recipes()) == set(HEADS)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_a_dry_run_of_every_recipe(name: str, tmp_path: Path) -> None:
    check = _planned(name, tmp_path)
    assert check.problems == []
    assert [round(cost.architecture.num_parameters / 1e6) for cost in check.costs] == MILLIONS[name]
    console = Console(width=160, record=True)
    console.print(recipe_table(check))
    shown = console.export_text()
    assert all(cost.name in shown for cost in check.costs)
    assert "GFLOP/s" in how_estimated(check)
    assert all(cost.seconds for cost in check.costs)


# GB of the smallest common GPU for each; None for none.
GPU_OF = {
    "demo": 16,
    "smollm2-135m": 16,
    "pythia-1b": 24,
    "gpt2-xl": 40,
    "qwen3-4b": 80,
    "llama-3-8b": 80,
    "gemma-3-1b-public": 24,
    "gpt2-xl-public": 40,
    "pythia-410m-public": 16,
    "qwen3-1.7b-public": 40,
    "smollm2-360m-public": 16,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(GPU_OF))
def test_the_gpu_that_a_recipe_fits_on(name: str, tmp_path: Path) -> None:
    check = _planned(name, tmp_path)
    assert smallest_gpu(max(cost.gpu_memory for cost in check.costs)) == GPU_OF[name]


@pytest.mark.parametrize("name", sorted(HEADS))
def test_the_targets_lie_between_the_anchors(name: str) -> None:
    recipe, sizes = read_recipe(name), MILLIONS[name]
    assert recipe.evaluation is not None and recipe.evaluation.sizes
    counts = [size for size in recipe.evaluation.sizes if isinstance(size, float)]
    assert counts and all(sizes[-1] * 1e6 < size < sizes[0] * 1e6 for size in counts)


@pytest.mark.parametrize("name", sorted(set(HEADS) - {"demo"}))
def test_what_was_not_run_says_so(name: str) -> None:
    assert "Not run" in shipped_recipes()[name]


# As on two cores, where the source reads 380 tokens a second.
SLOW = Speed(products=2.04e11, device="cpu", training=1.02e11, forward=1.02e11)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_demo_takes_minutes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bf16: bool) -> None:
    speed = dataclasses.replace(SLOW, training=2.2 * SLOW.training) if bf16 else SLOW
    monkeypatch.setattr("cbd_trl.recipe.check.measure_speed", lambda *_: speed)
    changes = Settings(default_steps(bf16), 0, bf16).changes(Path("source"), Path("chain"))
    check = _planned("demo", tmp_path, changes)
    seconds = [cost.seconds for cost in check.costs]
    total = sum(seconds) + check.measuring + writing_seconds(check.model_weights(), ANSWER_TOKENS, speed)
    assert total < 15 * 60


def test_the_demo_without_bf16_is_the_recipe_as_it_stands() -> None:
    changes = Settings(default_steps(False), 0, False).changes(Path("source"), Path("chain"))
    recipe, changed = read_recipe("demo"), read_recipe("demo", changes)
    assert (recipe.args, recipe.anchors) == (changed.args, changed.anchors)
    assert (changed.source.name, changed.output_dir) == ("source", "chain")


def test_a_shipped_name_is_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with a config and no weights: the dry run tells what it would be, and what is missing."""
    SMOLLM2_CONFIG.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    flags = ["--dry-run", "--set", f"source={tmp_path / 'source'}", "--set", f"output_dir={tmp_path / 'chain'}"]
    assert main(["build", "demo", *flags]) == 1
    shown = capsys.readouterr()
    assert "134.5M" in shown.out and "84.95M" in shown.out and "44.05M" in shown.out
    assert "this is a dry run" in shown.out
    assert "has no model.safetensors" in shown.err
    assert shown.err.count("\n  - ") == 1
    (tmp_path / "source" / "model.safetensors").touch()
    assert main(["build", "demo", *flags]) == 1
    assert "a weight file that is damaged or cut off" in capsys.readouterr().err
    assert not (tmp_path / "chain").exists()


@pytest.mark.parametrize("name", PUBLIC)
def test_a_dry_run_of_public_anchors_reads_their_configs(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every model is in a folder with its published config, and nothing else than its weights is missing."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**13))
    changes = [*_in_folders(name, tmp_path), f"output_dir={tmp_path / 'chain'}"]
    changes += ["data={name: demo, split: train}", "evaluation.data={name: demo, split: held_out}"]
    assert main(["build", name, "--dry-run", *(word for change in changes for word in ("--set", change))]) == 1
    shown, anchors = capsys.readouterr(), len(MILLIONS[name]) - 1
    assert (
        shown.out.count(" becomes this anchor, in the coordinates of the one above, and teaches it, too.") == anchors
    )
    assert shown.err.count("has no model.safetensors") == shown.err.count("\n  - ") == 1 + anchors
    assert not (tmp_path / "chain").exists()


def test_the_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--list-recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in HEADS)
    assert main(["build", "smolm2-135m"]) == 1
    assert "Did you mean 'smollm2-135m'?" in capsys.readouterr().err
