"""A recipe is checked whole before any work: what cannot be is said at once, with its place; nothing is made."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from cbd_trl.architectures.registry import describe_shape
from cbd_trl.cli.main import main
from cbd_trl.recipe.check import check_recipe, how_models_are_used, shapes_table
from cbd_trl.recipe.run import build_recipe
from cbd_trl.recipe.schema import parse_recipe
from tests.bridge.tokenizers_of_kinds import make_tokenizer
from tests.recipe.helpers import ARGS, raw_recipe, write_recipe
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

DEEP = {"num_hidden_layers": 4}
DEEP_ANCHOR = {"shape": DEEP}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("student")
    tiny_model("gpt2", vocab_size=300, n_positions=64).save_pretrained(folder)
    make_tokenizer(size=300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with other tokens, of bytes as well."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_model("llama", vocab_size=420).save_pretrained(folder)
    make_tokenizer(size=420, seed=1).save_pretrained(folder)
    return folder


def _problems(folder: Path, output: Path, **changes: Any) -> list[str]:
    raw = raw_recipe(folder, output_dir=str(output / "chain"), **changes)
    problems = check_recipe(parse_recipe(raw, "some")).problems
    assert not list(output.iterdir())
    return problems


def test_a_recipe_that_is_right_has_no_problems(inputs: Path, tmp_path: Path) -> None:
    assert _problems(inputs, tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"anchors": [{"shape": {"num_hidden_layers": 7}}]}, "anchors[0]: num_hidden_layers=7 is larger than the 6"),
        (
            {"anchors": [{"shape": DEEP}, {"shape": {"num_hidden_layers": 5}}]},
            "anchors[1]: num_hidden_layers=5 is lar",
        ),
        (
            {"args": {**ARGS, "eos_token": "w7"}, "anchors": [{"shape": DEEP, "args": {"eos_token": "w8"}}]},
            "args: The trainings of the chain set eos_token='w7' and eos_token='w8'. A chain has one tokenizer",
        ),
        (
            {"args": {**ARGS, "eos_token": "<end>"}},
            "source: eos_token='<end>' is not in the vocabulary of the tokenizer",
        ),
        ({"anchors": [{"shape": {"hidden_size": 18}}]}, "anchors[0]: transformers refuses to save or load a llama"),
        ({"anchors": [{"shape": {"num_hidden_layer": 4}}]}, "anchors[0]: "),
        ({"anchors": [{"shape": {"num_hidden_layers": "four"}}]}, "anchors[0]: "),
        ({"anchors": [{"shape": {"num_hidden_layers": 6}}]}, "anchors[0] has 48,544 parameters, no fewer than the"),
        ({"anchors": ["nowhere/small"]}, "anchors[0]: The model of anchors[0] 'nowhere/small' is not a model folder"),
        ({"anchors": [{"size": 5e6}]}, "anchors[0]: "),
        ({"anchors": [{"ratio": 0.001}]}, "anchors[0]: "),
        ({"shape_search": 4}, "shape_search=4 compares shapes of anchors that are requested by their size"),
        ({"shape_search": 1}, "shape_search: 1 must be greater than or equal to 2"),
        ({"shape_search": 4, "shape_trainings": 5, "anchors": [{"ratio": 0.5}]}, "shape_search: shape_trainings=5"),
        ({"args": {**ARGS, "divergence": "reverse-kl"}}, "args.divergence: Unknown divergence 'reverse-kl'"),
        (
            {"anchors": [{"shape": DEEP, "args": {"divergence": "klx"}}]},
            "anchors[0].args.divergence: Unknown divergence 'klx'",
        ),
        ({"args": {**ARGS, "kd_weight": -1.0}}, "args.kd_weight: kd_weight=-1.0: a weight of the loss must be finite"),
        ({"args": {**ARGS, "eval_strategy": "steps"}}, "args.eval_strategy: "),
        ({"args": {**ARGS, "teacher_model_name_or_path": "x"}}, "anchors[0]: The args of a chain set teacher_model"),
        ({"args": {**ARGS, "max_length": 65}}, "anchors[0].args.max_length: 65 tokens are more than the 64"),
        ({"source": "nowhere/at-all"}, "source: The source 'nowhere/at-all' is not a model folder"),
        ({"data": "missing.jsonl"}, "data: there is no file missing.jsonl"),
        ({"anchors": [{"shape": DEEP, "data": "gone.csv"}]}, "anchors[0].data: there is no file gone.csv"),
        (
            {"evaluation": {"data": "gone.txt", "tokens": 64, "length": 16}},
            "evaluation.data: there is no file gone.txt",
        ),
        ({"bridge": {"model": "nowhere/student"}}, "bridge: The model of the bridge 'nowhere/student' is not a model"),
    ],
)
def test_one_thing_cannot_be(inputs: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    problems = _problems(inputs, tmp_path, **{"evaluation": None, **changes})
    # A teacher that all anchors name is named for each.
    assert [problem.startswith(said) for problem in problems if "anchors[1] " not in problem][:1] == [True], problems
    assert len(problems) == (2 if "teacher" in said else 1), problems


def test_shapes_and_text_are_looked_at_where_the_arguments_are_wrong(inputs: Path, tmp_path: Path) -> None:
    anchors = [{"shape": {"num_hidden_layers": 9}}]
    args = {**ARGS, "divergence": "klx"}
    problems = _problems(inputs, tmp_path, args=args, anchors=anchors, data="gone.jsonl")
    assert [problem.partition(":")[0] for problem in problems] == ["args.divergence", "data", "anchors[0]"]


def test_a_mix_of_several_formats(inputs: Path, tmp_path: Path) -> None:
    chats = tmp_path.with_suffix(".jsonl")
    chats.write_text('{"prompt": "w1", "completion": "w2"}\n')
    data = [{"name": str(inputs / "rows.jsonl"), "share": 1}, {"name": str(chats), "share": 1}]
    [problem] = _problems(inputs, tmp_path, data=data)
    assert problem.startswith("data: a mix needs rows of one format")
    assert "rows.jsonl': ['text']" in problem and f"{str(chats)!r}: ['prompt', 'completion']" in problem


def test_measuring_on_what_was_trained_on(inputs: Path, tmp_path: Path) -> None:
    text = str(inputs / "more.jsonl")
    [problem] = _problems(inputs, tmp_path, evaluation={"data": text, "tokens": 64, "length": 16})
    assert problem.startswith(f"evaluation.data: {text} (train) is trained on, too (")
    data = {"name": text, "split": "train[:12]"}
    evaluation = {"data": {"name": text, "split": "train[12:]"}, "tokens": 64, "length": 16}
    anchors = [{"shape": DEEP}]
    assert _problems(inputs, tmp_path, data=data, anchors=anchors, evaluation=evaluation) == []


def test_a_slice_of_what_was_trained_on_by_another_path(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    evaluation = {"data": {"name": str(inputs / "rows.jsonl"), "split": "train[90%:]"}, "tokens": 64, "length": 16}
    [problem] = _problems(inputs, tmp_path, data="./rows.jsonl", anchors=[{"shape": DEEP}], evaluation=evaluation)
    text = inputs / "rows.jsonl"
    assert problem.startswith(f"evaluation.data: {text} (train[90%:]) is trained on, too (data: train), so its loss")
    assert problem.endswith("slices that share no row: train[:95%] and train[95%:].")


def test_what_cannot_be_measured(inputs: Path, tmp_path: Path) -> None:
    held = str(inputs / "held.jsonl")
    evaluation = {"data": held, "length": 128, "sizes": [60e3, 30e3, "8K"]}
    assert _problems(inputs, tmp_path, evaluation=evaluation) == [
        "evaluation.length: 128 tokens are more than the 64 that the models can read.",
        "evaluation.sizes[0]: 60,000 parameters are not between the smallest anchor (8,848) and the largest (48,544), "
        "where all targets lie.",
        "evaluation.sizes[2]: 8,000 parameters are not between the smallest anchor (8,848) and the largest (48,544), "
        "where all targets lie.",
    ]


def test_targets_and_operators_that_there_are_not(inputs: Path, tmp_path: Path) -> None:
    evaluation = {"data": str(inputs / "held.jsonl"), "tokens": 64, "length": 16}
    evaluation |= {"sizes": [{"num_hidden_layer": 5}, {"num_hidden_layers": 5}], "operators": ["nestd", "random"]}
    found = _problems(inputs, tmp_path, evaluation=evaluation)
    assert [problem.partition(":")[0] for problem in found] == [
        "evaluation.operators[0]",
        "evaluation.sizes[0].num_hidden_layer",
    ]
    assert "'nested'" in found[0] and "'num_hidden_layers'" in found[1]
    [problem] = _problems(inputs, tmp_path, evaluation={**evaluation, "sizes": [], "operators": "random"})
    assert problem.startswith("evaluation.operators: random needs an operator beside it")


def test_a_slice_without_rows_is_found_before_the_chain_is_begun(inputs: Path, tmp_path: Path) -> None:
    evaluation = {"data": {"name": str(inputs / "held.jsonl"), "split": "train[90:]"}, "tokens": 64, "length": 16}
    recipe = parse_recipe(raw_recipe(inputs, output_dir=str(tmp_path / "chain"), evaluation=evaluation), "some")
    with pytest.raises(ValueError, match=r"^evaluation\.data: .* corresponds to no data"):
        build_recipe(recipe)
    assert not list(tmp_path.iterdir())


def test_a_folder_has_no_revision(inputs: Path, tmp_path: Path) -> None:
    [problem] = _problems(inputs, tmp_path, source={"name": str(inputs / "source"), "revision": "v1"})
    assert problem.startswith("source.revision: ") and "is a folder, which has no revision 'v1'" in problem


def test_models_as_anchors(inputs: Path, tmp_path: Path) -> None:
    """What each is used for is known from configs, and so is what is wrong with it."""
    folders = {name: tmp_path.with_name(f"{tmp_path.name}-{name}") for name in ("small", "other")}
    for name, fields in (("small", {"num_hidden_layers": 5}), ("other", {"num_hidden_layers": 3, "head_dim": 4})):
        tiny_model("llama", seed=2, tie_word_embeddings=True, **fields).save_pretrained(folders[name])
        tiny_tokenizer().save_pretrained(folders[name])
    small, other = map(str, folders.values())
    raw = raw_recipe(inputs, output_dir=str(tmp_path / "chain"), anchors=[small, {"model": other}])
    check = check_recipe(parse_recipe(raw, "some"))
    assert check.problems == []
    first, second = how_models_are_used(check).splitlines()
    assert first.endswith("-small becomes this anchor, in the coordinates of the one above, and teaches it, too.")
    assert "-other teaches this anchor beside the one above, from which it is cut" in second
    assert "differ in their head size: 8 and 4" in second
    (folders["other"] / "model.safetensors").unlink()
    problems = _problems(inputs, tmp_path, anchors=[{"model": small, "revision": "v1"}, other])
    assert problems[0].startswith("anchors[0].revision: ") and "has no revision 'v1'" in problems[0]
    assert problems[1].startswith("anchors[1].model: ") and "has no model.safetensors" in problems[1]
    [problem] = _problems(inputs, tmp_path, anchors=[small, small])
    assert problem.startswith("anchors[1] (") and "is the same model as the model of anchors[0]" in problem


def test_a_source_without_safetensors(inputs: Path, tmp_path: Path) -> None:
    source = tmp_path.with_name("without")
    shutil.copytree(inputs / "source", source, ignore=shutil.ignore_patterns("*.safetensors"))
    [problem] = _problems(inputs, tmp_path, source=str(source))
    assert "has no model.safetensors" in problem


def test_a_dry_run_lists_the_shapes_of_a_search(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "chain")
    raw = raw_recipe(inputs, anchors=[DEEP_ANCHOR, {"ratio": 0.5}], shape_search=4, evaluation=None, output_dir=output)
    check = check_recipe(parse_recipe(raw, "some"))
    assert check.problems == [] and [step.search is None for step in check.steps] == [True, False]
    table = shapes_table(check)
    assert table is not None and table.row_count == 4
    shapes = list(table.columns[1].cells)
    assert shapes[0] == describe_shape(check.steps[1].architecture.shape, short=True) and len(set(shapes)) == 4
    assert shapes_table(check_recipe(parse_recipe({**raw, "shape_search": None}, "some"))) is None
    # A flag is the key of the same name.
    recipe = write_recipe(inputs, anchors=raw["anchors"], evaluation=None, output_dir=output)
    assert main(["build", str(recipe), "--dry-run", "--shape-search", "1"]) == 1
    assert "shape_search: 1 must be" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_shows_the_shapes(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(inputs, anchors=[0.5], evaluation=None, output_dir=str(tmp_path / "chain"))
    assert main(["build", str(recipe), "--dry-run", "--shape-search", "3"]) == 0
    assert "Shapes to compare" in capsys.readouterr().out


def test_a_bridge(inputs: Path, teacher: Path, student: Path, tmp_path: Path) -> None:
    bridge = {"model": str(student), "args": {"objective": "alm", "max_steps": 3}}
    anchors = [{"shape": {"n_layer": 3}}]
    assert _problems(inputs, tmp_path, source=str(teacher), bridge=bridge, anchors=anchors) == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"objective": "almm"}, "bridge.args.objective: "),
        ({"objective": "alm", "top_k": 4}, "bridge.args.top_k: top_k=4 is an option of "),
        (
            {"swap_probability": 0.5},
            "bridge.args.swap_probability: swap_probability=0.5 has no meaning across vocabularies",
        ),
        ({"teacher_model_name_or_path": "x"}, "bridge: The args of the bridge set teacher_model_name_or_path"),
        ({"eval_strategy": "steps"}, "bridge.args.eval_strategy: "),
    ],
)
def test_a_bridge_that_cannot_be(
    inputs: Path, teacher: Path, student: Path, tmp_path: Path, args: dict[str, Any], said: str
) -> None:
    bridge, anchors = {"model": str(student), "args": args}, [{"shape": {"n_layer": 3}}]
    problems = _problems(inputs, tmp_path, source=str(teacher), bridge=bridge, anchors=anchors)
    assert len(problems) == 1 and problems[0].startswith(said), problems


def test_a_bridge_to_the_same_tokenizer(inputs: Path, tmp_path: Path) -> None:
    [problem] = _problems(inputs, tmp_path, bridge={"model": str(inputs / "source")})
    assert problem.startswith("bridge: The source and the model of the bridge have one tokenizer")


def test_too_little_disk(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, asked = namedtuple("usage", "total used free"), []

    def disk_usage(folder: Path) -> Any:
        asked.append(folder)
        return usage(10**9, 10**9 - 200_000, 200_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    [problem] = _problems(inputs, tmp_path)
    assert problem.startswith("output_dir: the chain needs ") and "are free. Make room" in problem
    # The folder is not there yet: the disk is that of the nearest one that is.
    assert asked == [tmp_path]


def test_nothing_is_written_or_loaded_before_the_check_is_passed(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(inputs, anchors=[{"shape": {"num_hidden_layers": 7}}]).rename(tmp_path / "recipe.yaml")
    flags = ["build", str(recipe), "--set", f"output_dir={tmp_path / 'chain'}"]
    look = AutoModelForCausalLM.from_pretrained

    def only_headers(*place: Any, **options: Any) -> Any:
        assert options["device_map"] == "meta", "loaded"
        return look(*place, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", only_headers)
    assert main(flags) == 1
    assert "line 8, anchors[0]: num_hidden_layers=7" in capsys.readouterr().err
    assert main([*flags, "--set", "anchors[0].shape.num_hidden_layers=4", "--dry-run"]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]
