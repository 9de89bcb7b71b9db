"""A recipe is built: the chain that `build_chain` makes of the same arguments, and what it is worth beside it."""

import dataclasses
import json
from pathlib import Path

import pytest
from datasets import interleave_datasets, load_dataset
from safetensors.torch import load_file

from cbd_trl import Chain, DistillConfig, build_chain, from_chain
from cbd_trl.chain.calibration import token_blocks
from cbd_trl.cli import main
from cbd_trl.losses.held_out import held_out_loss
from cbd_trl.recipe.read import read_recipe
from cbd_trl.recipe.run import build_recipe
from tests.chain.helpers import CHAIN_ANCHORS, same_weights
from tests.recipe.helpers import ARGS, write_recipe
from tests.tokenizer import tiny_tokenizer

SIZE = 30_000


def _assert_same(chain: Chain, expected: Chain) -> None:
    """The same anchors, tensor by tensor; the header of a safetensors file may have another order."""
    for ours, theirs in zip(chain.anchors, expected.anchors, strict=True):
        assert same_weights(ours.load_state_dict(), theirs.load_state_dict())
        assert same_weights(load_file(ours.statistics_file), load_file(theirs.statistics_file))
        if ours.parent is not None:
            assert ours.training == theirs.training


def _rows(file: Path):
    return load_dataset("json", data_files=str(file), split="train")


@pytest.fixture(scope="module")
def built(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The recipe and the chain that the command built from it."""
    folder = tmp_path_factory.mktemp("built")
    file = write_recipe(inputs)
    recipe = file.rename(folder / "recipe.yaml")
    flags = ["--set", f"output_dir={folder / 'chain'}", "--set", f"evaluation.sizes=[{SIZE}]"]
    assert main(["build", str(recipe), *flags]) == 0
    return recipe, folder / "chain"


def test_the_chain_is_that_of_build_chain(inputs: Path, built: tuple[Path, Path], tmp_path: Path) -> None:
    more = _rows(inputs / "more.jsonl")
    mix = interleave_datasets([_rows(inputs / "rows.jsonl"), more], probabilities=[0.75, 0.25], seed=3)
    args = DistillConfig(output_dir=str(tmp_path), **ARGS)
    own = dataclasses.replace(args, learning_rate=2e-3, divergence="reverse_kl")
    expected = build_chain(
        inputs / "source",
        [{**CHAIN_ANCHORS[0], "args": own}, {**CHAIN_ANCHORS[1], "dataset": more}],
        dataset=mix,
        output_dir=tmp_path / "chain",
        args=args,
        calibration_tokens=64,
    )
    _assert_same(Chain.from_pretrained(built[1]), expected)


def test_what_the_chain_is_worth_stands_beside_it(inputs: Path, built: tuple[Path, Path]) -> None:
    report = json.loads((built[1] / "held_out.json").read_text())
    chain = Chain.from_pretrained(built[1])
    blocks = token_blocks(_rows(inputs / "held.jsonl"), tiny_tokenizer(), 64, 16)
    models = [*(anchor.load_model() for anchor in chain.anchors), from_chain(chain, SIZE)]
    assert report["tokens"] == blocks.numel() == 64
    assert [entry["loss"] for entry in report["models"]] == [held_out_loss(model, blocks) for model in models]
    assert [entry["num_parameters"] for entry in report["models"]] == [model.num_parameters() for model in models]
    assert [entry["kind"] for entry in report["models"]] == ["anchor"] * 3 + ["target"]


def test_run_again_nothing_is_redone(built: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    recipe, folder = built
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    assert len(before) == 6
    flags = ["--set", f"output_dir={folder}", "--set", f"evaluation.sizes=[{SIZE}]"]
    assert main(["build", str(recipe), *flags]) == 0
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")} == before
    assert capsys.readouterr().out.count("finished") == 3


def test_another_recipe_over_the_same_folder_is_refused(
    built: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = built
    before = (folder / "chain.json").read_bytes()
    assert main(["build", str(recipe), "--set", f"output_dir={folder}", "--set", "args.max_steps=3"]) == 1
    assert "changed arguments: ['max_steps']" in capsys.readouterr().err
    assert (folder / "chain.json").read_bytes() == before


def test_an_anchor_given_by_its_size_may_have_args_of_its_own(inputs: Path, tmp_path: Path) -> None:
    recipe = write_recipe(inputs, anchors=[{"ratio": 0.7, "args": {"max_steps": 1}}], evaluation=None)
    chain = build_recipe(read_recipe(recipe, [f"output_dir={tmp_path / 'chain'}"]))
    other = build_chain(
        inputs / "source",
        [0.7],
        dataset=interleave_datasets(
            [_rows(inputs / "rows.jsonl"), _rows(inputs / "more.jsonl")], probabilities=[0.75, 0.25], seed=3
        ),
        output_dir=tmp_path / "other",
        args=DistillConfig(output_dir="unused", **{**ARGS, "max_steps": 1}),
        calibration_tokens=64,
    )
    _assert_same(chain, other)
