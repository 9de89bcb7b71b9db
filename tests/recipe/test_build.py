"""A recipe is built: the chain that `build_chain` makes of the same arguments, and what it is worth beside it."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from datasets import interleave_datasets, load_dataset
from safetensors.torch import load_file

from cbd_trl import Chain, DistillConfig, DistillTrainer, build_chain, from_chain
from cbd_trl.cli.main import main
from cbd_trl.losses.held_out import held_out_loss
from cbd_trl.recipe.run import build_recipe
from cbd_trl.recipe.schema import RecipeError, parse_recipe, read_recipe
from cbd_trl.utils.blocks import token_blocks
from tests.chain.helpers import CHAIN_ANCHORS, same_weights
from tests.recipe.helpers import ARGS, raw_recipe, write_recipe
from tests.tiny import tiny_model
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


class Built(NamedTuple):
    """What the command was given, what it made, and what its trainers were given."""

    recipe: Path
    folder: Path
    trainings: list[dict[str, Any]]

    @property
    def flags(self) -> list[str]:
        return ["--set", f"output_dir={self.folder}", "--set", f"evaluation.sizes=[{SIZE}]"]


@pytest.fixture(scope="module")
def built(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder, trainings = tmp_path_factory.mktemp("built"), []

    class Noting(DistillTrainer):
        def __init__(self, **given: Any) -> None:
            trainings.append(given)
            super().__init__(**given)

    built = Built(write_recipe(inputs).rename(folder / "recipe.yaml"), folder / "chain", trainings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cbd_trl.build.build.DistillTrainer", Noting)
        assert main(["build", str(built.recipe), *built.flags]) == 0
    return built


def test_the_chain_is_that_of_build_chain(inputs: Path, built: Built, tmp_path: Path) -> None:
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
    _assert_same(Chain.from_pretrained(built.folder), expected)


def test_each_step_has_its_own_objective_and_text(inputs: Path, built: Built) -> None:
    upper, lower = built.trainings
    assert (upper["args"].divergence, upper["args"].learning_rate) == ("reverse_kl", 2e-3)
    assert (lower["args"].divergence, lower["args"].learning_rate) == ("forward_kl", 1e-3)
    more = _rows(inputs / "more.jsonl")["text"]
    assert lower["train_dataset"]["text"] == more
    assert set(upper["train_dataset"]["text"]) <= {*_rows(inputs / "rows.jsonl")["text"], *more}


def test_what_the_chain_is_worth_stands_beside_it(inputs: Path, built: Built) -> None:
    report, chain = (
        json.loads((built.folder / "loss-against-size.json").read_text()),
        Chain.from_pretrained(built.folder),
    )
    blocks = token_blocks(_rows(inputs / "held.jsonl"), tiny_tokenizer(), 64, 16).input_ids
    assert blocks.numel() == 64
    for entry, anchor in zip(report["anchors"], chain.anchors, strict=True):
        assert (entry["name"], entry["loss"]) == (anchor.name, held_out_loss(anchor.load_model(), blocks))
    [entry], target = report["targets"], from_chain(chain, SIZE)
    assert entry["num_parameters"] == target.num_parameters()
    assert entry["loss"] == {"nested": held_out_loss(target, blocks)}
    card = (built.folder / "README.md").read_text()
    assert "## Measured" in card and f"{report['anchors'][0]['loss']:.3f}" in card


def test_the_recipe_is_kept_beside_the_chain(built: Built) -> None:
    kept = json.loads((built.folder / "recipe.json").read_text())
    assert [part["share"] for part in kept["data"]] == [0.75, 0.25]
    assert kept["anchors"][0]["args"] == {"learning_rate": 2e-3, "divergence": "reverse_kl"}


def test_a_dry_run_tells_what_is_finished(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in built.folder.rglob("*")}
    shape = "{shape: {num_hidden_layers: 3}}"
    more = f"anchors=[{{shape: {CHAIN_ANCHORS[0]}, args: {{learning_rate: 0.002, divergence: reverse_kl}}}}, {shape}]"
    assert main(["build", str(built.recipe), *built.flags, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("finished") == 3 and " left " in shown and "this is a dry run" in shown
    assert main(["build", str(built.recipe), *built.flags, "--set", more, "--dry-run"]) == 1
    assert "built with other settings than requested now" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in built.folder.rglob("*")} == before


def test_run_again_nothing_is_redone(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    # Pictures are copied beside the cards each time.
    files = [file for file in built.folder.rglob("*.*") if file.suffix != ".png"]
    before = {file: file.stat().st_mtime_ns for file in files}
    assert sum(file.suffix == ".safetensors" for file in before) == 6
    assert main(["build", str(built.recipe), *built.flags]) == 0
    assert {file: file.stat().st_mtime_ns for file in files} == before
    assert capsys.readouterr().out.count("finished") == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("args.max_steps=3", "changed arguments: ['max_steps']"),
        ("anchors[1].args={divergence: jsd}", "changed arguments: ['divergence']"),
        ("data[0].share=0.5", "begun with another data"),
        ("anchors[1].data=rows.jsonl", "begun with another anchors[1].data"),
        ("calibration_tokens=128", "begun with another calibration_tokens: 64, and 128"),
        ("anchors[1].shape.hidden_size=8", "built with other settings"),
    ],
)
def test_another_recipe_over_the_same_folder_is_refused(
    inputs: Path, built: Built, change: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.read_bytes() for file in built.folder.rglob("*.json")}
    change = change.replace("rows.jsonl", str(inputs / "rows.jsonl"))
    flags = ["--set", f"output_dir={built.folder}", "--set", change]
    assert main(["build", str(built.recipe), *flags]) == 1
    shown = capsys.readouterr().err
    assert said in shown and "output_dir" in shown
    assert {file: file.read_bytes() for file in built.folder.rglob("*.json")} == before


def test_an_anchor_given_by_its_size_may_have_args_of_its_own(inputs: Path, tmp_path: Path) -> None:
    """And a shape that is searched."""
    searched = {"shape_search": 2, "shape_trainings": 2, "shape_training_steps": 1}
    recipe = write_recipe(inputs, anchors=[{"ratio": 0.7, "args": {"max_steps": 1}}], evaluation=None, **searched)
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
        **searched,
    )
    _assert_same(chain, other)
    records = [made.anchors[1].training["shape_search"] for made in (chain, other)]
    assert records[0] == records[1] and all("trained" in entry for entry in records[0]["scores"])


def test_a_size_that_no_target_has_is_named_and_the_others_are_measured(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between 4 layers and 2 there may be a target of 3 or not: which, the anchors tell."""
    anchors = [{"shape": {"num_hidden_layers": 4}}, {"shape": {"num_hidden_layers": 2}}]
    evaluation = {"data": str(inputs / "held.jsonl"), "tokens": 64, "length": 16, "sizes": [28_000, 33_000]}
    folder = tmp_path / "chain"
    recipe = write_recipe(inputs, anchors=anchors, evaluation=evaluation, output_dir=str(folder))
    assert main(["build", str(recipe)]) == 0
    assert "evaluation.sizes: 28,000 is not measured. No reachable size is within" in capsys.readouterr().out
    [target] = json.loads((folder / "loss-against-size.json").read_text())["targets"]
    assert target["num_parameters"] == 33_056


def test_an_anchor_that_exists_already(inputs: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    tiny_model("llama", seed=2, tie_word_embeddings=True, num_hidden_layers=4).save_pretrained(small)
    tiny_tokenizer().save_pretrained(small)
    raw = raw_recipe(inputs, output_dir=str(tmp_path / "chain"), evaluation=None)
    chain = build_recipe(parse_recipe({**raw, "anchors": [{"model": str(small), "args": {"max_steps": 1}}]}, "some"))
    record = chain.anchors[1].training["public_model"]
    assert record["model"].startswith("small@") and record["obstacle"] is None
    assert chain.anchors[1].arguments["max_steps"] == 1
    # The same shape, cut, is another anchor.
    cut = parse_recipe({**raw, "anchors": [{"shape": {"num_hidden_layers": 4}, "args": {"max_steps": 1}}]}, "some")
    with pytest.raises(RecipeError, match=r"output_dir: .*changed arguments: \['model', 'way'\]"):
        build_recipe(cut)
