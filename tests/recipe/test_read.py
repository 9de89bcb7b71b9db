"""A recipe is read: what is wrong with the file is said at once, each with its line and its place."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cbd_trl.cli.main import main
from cbd_trl.recipe.schema import AnchorPart, DataPart, RecipeError, SourcePart, lines_of, parse_recipe, read_recipe
from tests.recipe.helpers import raw_recipe

SHORT = "source: s\ndata: d.jsonl\nanchors: [0.5]\noutput_dir: out\n"


def _read(folder: Path, text: str, *changes: str) -> Any:
    file = folder / "some.yaml"
    file.write_text(text)
    return read_recipe(file, changes)


def _problems(**changes: Any) -> tuple[str, ...]:
    return parse_recipe(raw_recipe(Path("folder"), **changes), "some").problems


def test_what_a_recipe_says(tmp_path: Path) -> None:
    text = (
        "source: {name: me/model, revision: v1}\n"
        "data:\n"
        "  - {name: a.jsonl, share: 3}\n"
        "  - {name: me/data, config: en, split: 'train[:90%]', column: body, share: 1}\n"
        "anchors: [{size: 85M, args: {learning_rate: 4e-4}, data: b.jsonl}, 0.5, {shape: {num_hidden_layers: 2}},\n"
        "  me/small, {model: small, revision: v2}]\n"
        "output_dir: out\n"
        "args: {max_steps: 5, save_strategy: no, learning_rate: 1}\n"
    )
    recipe = _read(tmp_path, text)
    assert recipe.problems == () and recipe.name == "some" and recipe.output_dir == "out"
    assert recipe.source == SourcePart(name="me/model", revision="v1")
    assert recipe.data == (
        DataPart(name="a.jsonl", share=3.0),
        DataPart(name="me/data", config="en", split="train[:90%]", column="body", share=1.0),
    )
    own = DataPart(name="b.jsonl")
    # YAML reads 4e-4, without a dot, as text, and a bare `no` as false.
    assert recipe.anchors == (
        AnchorPart(size=85e6, args={"learning_rate": 4e-4}, data=(own,)),
        AnchorPart(ratio=0.5),
        AnchorPart(shape={"num_hidden_layers": 2}),
        AnchorPart(model="me/small"),
        AnchorPart(model="small", revision="v2"),
    )
    assert recipe.anchors[4].target == {"model": "small", "revision": "v2"}
    assert recipe.args == {"max_steps": 5, "save_strategy": "no", "learning_rate": 1}


@pytest.mark.parametrize(
    ("changes", "place", "shown"),
    [
        ({"ancors": []}, "ancors", "Did you mean 'anchors'? The keys are: source, data, anchors"),
        ({"name": "x"}, "name", "no such key"),
        ({"args": {"learning_rat": 1.0}}, "args.learning_rat", "Did you mean 'learning_rate'?"),
        ({"args": {"output_dir": "x"}}, "args.output_dir", "no such key"),
        ({"args": {"max_steps": "many"}}, "args.max_steps", "'many' must be a valid integer"),
        ({"args": {"max_steps": 2.5}}, "args.max_steps", "2.5 must be"),
        ({"args": {"packing": 1}}, "args.packing", "1 must be a valid boolean"),
        ({"args": {"learning_rate": True}}, "args.learning_rate", "True must be a valid number"),
        ({"args": [1]}, "args", "[1] must be a valid mapping"),
        ({"source": 7}, "source", "7 must be a mapping with the keys name, revision"),
        ({"source": {"name": "s", "revison": "v1"}}, "source.revison", "Did you mean 'revision'?"),
        ({"source": {"name": " "}}, "source.name", ""),
        ({"source": None}, "source", "missing"),
        ({"data": []}, "data", "must not be empty"),
        ({"data": [{"name": "a"}, {"name": "b", "share": 1}]}, "data", "a has no share"),
        ({"data": {"name": "a", "share": 0}}, "data.share", "0 must be greater than 0"),
        ({"data": {"name": "a", "share": float("inf")}}, "data.share", "inf"),
        ({"data": {"name": "a", "split": 3}}, "data.split", "3 must be a valid string"),
        ({"anchors": []}, "anchors", "must not be empty"),
        ({"anchors": [["big"]]}, "anchors[0]", "['big']"),
        ({"anchors": [{"args": {}}]}, "anchors[0]", "shape, size, ratio and model; there are 0"),
        ({"anchors": [{"size": 5e6, "ratio": 0.5}]}, "anchors[0]", "shape, size, ratio and model; there are 2"),
        ({"anchors": [{"shape": {"n": 1}, "model": "a"}]}, "anchors[0]", "shape, size, ratio and model; there are 2"),
        ({"anchors": [{"size": 5e6, "revision": "v1"}]}, "anchors[0]", "a revision, and no model"),
        ({"anchors": [{"ratio": 2}]}, "anchors[0].ratio", "2 must be less than or equal to 1"),
        ({"anchors": [{"size": 0.5}]}, "anchors[0].size", "0.5 must be greater than 1"),
        ({"anchors": [{"shape": 16}]}, "anchors[0].shape", "16 must be a valid mapping"),
        ({"anchors": [{"shape": {"n": 1, "dataset": "x"}}]}, "anchors[0].shape", "dataset"),
        ({"anchors": [{"shap": {"n": 1}}]}, "anchors[0].shap", "Did you mean 'shape'?"),
        ({"bridge": {"args": {}}}, "bridge.model", "missing"),
        ({"bridge": {"model": "m", "args": {"objectiv": "alm"}}}, "bridge.args.objectiv", "Did you mean 'objective"),
        ({"evaluation": {"tokens": 640}}, "evaluation.data", "missing"),
        ({"evaluation": {"data": "d", "sizes": ["x"]}}, "evaluation.sizes[0]", "'x'"),
        ({"evaluation": {"data": "d", "sizes": [{}]}}, "evaluation.sizes[0]", "must not be empty"),
        ({"evaluation": {"data": "d", "tokens": 10, "length": 20}}, "evaluation.tokens", "10 are fewer than the 20"),
        ({"calibration_tokens": True}, "calibration_tokens", "True must be a valid integer"),
        ({"output_dir": 5}, "output_dir", "5 must be a valid string"),
    ],
)
def test_one_thing_is_wrong(changes: dict[str, Any], place: str, shown: str) -> None:
    [problem] = _problems(**changes)
    assert problem.startswith(f"{place}: ") and shown in problem


def test_what_is_wrong_is_left_out_and_the_rest_is_read() -> None:
    anchors = [0.5, {"ratio": 0.5, "args": {"max_stepz": 1, "seed": 2}}, ["big"], 0.4]
    recipe = parse_recipe(raw_recipe(Path("folder"), source=7, anchors=anchors, args={"seed": "x", "bf16": True}), "s")
    assert [problem.partition(":")[0] for problem in recipe.problems] == [
        "source",
        "anchors[1].args.max_stepz",
        "anchors[2]",
        "args.seed",
    ]
    assert recipe.source is None and recipe.args == {"bf16": True}
    # Those below one that is wrong would get its number.
    assert [anchor.args for anchor in recipe.anchors] == [{}, {"seed": 2}]


def test_all_that_is_wrong_is_said_together_with_its_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "some.yaml"
    file.write_text(
        "source: nowhere/at-all\n"  # line 1
        "data: missing.jsonl\n"
        "anchors:\n"
        "  - shape: {num_hidden_layers: 4}\n"
        "    args:\n"
        "      divergense: forward_kl\n"  # line 6
        "  - ratio: 3\n"
        "args:\n"
        "  max_steps: lots\n"
        "output_dir: out\n"
    )
    assert main(["build", str(file), "--dry-run"]) == 1
    shown = capsys.readouterr().err
    assert "(5 problems)" in shown
    assert "line 6, anchors[0].args.divergense: there is no such key. Did you mean 'divergence'?" in shown
    assert "line 7, anchors[1].ratio: 3 " in shown and "line 9, args.max_steps: 'lots' " in shown
    assert "line 1, source: " in shown and "line 2, data: there is no file missing.jsonl" in shown
    assert shown.rstrip().endswith("--set KEY=VALUE, such as --set source=DIR.")


def test_a_place_without_a_line_has_that_of_what_it_is_part_of() -> None:
    lines = lines_of("a:\n  - b: 1\n    c: {d: 2}\n")
    assert lines == {"a": 1, "a[0]": 2, "a[0].b": 2, "a[0].c": 3, "a[0].c.d": 3}
    error = RecipeError("r", ["a[0].c.e: x", "a[1]: y", "z: w", "other words"], lines)
    assert "- line 3, a[0].c.e: x\n  - line 1, a[1]: y\n  - z: w\n  - other words" in str(error)


def test_a_value_that_was_set_has_no_line(tmp_path: Path) -> None:
    recipe = _read(tmp_path, SHORT, "anchors[0]=0.7", "args.max_steps=3", "source=DIR")
    assert recipe.anchors == (AnchorPart(ratio=0.7),) and recipe.args == {"max_steps": 3}
    assert recipe.source == SourcePart(name="DIR")
    assert recipe.lines == {"data": 2, "anchors": 3, "output_dir": 4}


@pytest.mark.parametrize("change", ["args.max_steps", "anchors[4]=1", "anchors[x]=1", "source.name.x=1", "=3"])
def test_a_change_that_cannot_be_made(tmp_path: Path, change: str) -> None:
    with pytest.raises(ValueError, match=r"^--set "):
        _read(tmp_path, SHORT, change)


@pytest.mark.parametrize("change", ["args=[1", "source=a: b: c", "args={a: 1, a: 2}", "source=!!python/name:os.x"])
def test_a_changed_value_that_is_no_yaml(tmp_path: Path, change: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^--set {re.escape(change)}: .* cannot be read as YAML .* put quotes around"
    ):
        _read(tmp_path, SHORT, change)


@pytest.mark.parametrize("anchors", ["anchors: null\n", ""])
def test_no_anchors_are_said_once(tmp_path: Path, anchors: str) -> None:
    assert _read(tmp_path, f"source: s\ndata: d\noutput_dir: out\n{anchors}").problems == ("anchors: is missing.",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("source: a\nsource: b\n", "line 1: the key 'source' stands there twice"),
        ("a: &a {x: 1}\nb: {<<: *a, y: 1, y: 2}\n", "line 2: the key 'y' stands there twice"),
        ("a: &a {x: 1}\nb: {<<: *a, <<: *a}\n", r"line 2: the key '<<' stands there twice. .*<<: \[\*one, \*other\]"),
        ("a: {<<: 3}\n", "expected a mapping or list of mappings for merging"),
        ("source: !!python/object/apply:os.system ['touch hacked']\n", "could not determine a constructor"),
        ("source: !!python/name:os.system\n", "could not determine a constructor"),
        ("source: [\n", "expected the node content"),
        ("? [a, b]\n: c\n", "unhashable key"),
        ("just words\n", "must be a mapping with the keys source, data"),
        ("- a\n- b\n", "must be a mapping with the keys source, data"),
        ("", "must be a mapping with the keys source, data"),
        ("a: \xe9".encode("latin-1").decode("latin-1") + "\x00", "special characters are not allowed"),
        ("[" * 400, "cannot be read as YAML"),
    ],
)
def test_no_recipe_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        _read(tmp_path, text)
    assert not (tmp_path / "hacked").exists()


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ValueError, match="cannot be read as YAML"):
        read_recipe(file)


@pytest.mark.parametrize("key", ["true", "~", "1.5", "2020-01-01", "7"])
@pytest.mark.parametrize(
    "place", ["", "source: {name: s, KEY: x}\n", "args: {KEY: x}\n", "anchors: [{shape: {KEY: 1}}]\n"]
)
def test_a_key_that_is_no_text_is_one_problem(tmp_path: Path, key: str, place: str) -> None:
    lines = {line.partition(":")[0]: line for line in SHORT.splitlines(keepends=True)}
    lines |= {place.partition(":")[0]: place.replace("KEY", key)} if place else {key: f"{key}: x\n"}
    assert len(_read(tmp_path, "".join(lines.values())).problems) == 1


def test_aliases_of_aliases_are_no_trouble(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    recipe = _read(tmp_path, f"{bomb}source: *a29\ndata: *a29\nanchors: [0.5]\noutput_dir: *a29\n")
    assert len(recipe.problems) > 30
    assert max(map(len, recipe.problems)) < 2000


def test_what_stands_in_several_places_may_be_written_once(tmp_path: Path) -> None:
    text = "source: s\ndata: d\nanchors:\n  - {ratio: 0.5, args: &own {max_steps: 3}}\n  - {ratio: 0.5, args: *own}\n"
    recipe = _read(tmp_path, f"{text}output_dir: out\n")
    assert recipe.problems == () and recipe.anchors[1].args == {"max_steps": 3}


def test_merged_keys_give_way_to_own_ones(tmp_path: Path) -> None:
    text = (
        "source: s\ndata: d\noutput_dir: out\nanchors:\n"
        "  - {ratio: 0.5, args: &one {max_steps: 3, seed: 1}}\n"
        "  - {ratio: 0.5, args: &two {seed: 2, <<: *one}}\n"
        "  - {ratio: 0.5, args: {<<: [*two, *one], learning_rate: 1.0}}\n"
    )
    recipe = _read(tmp_path, text)
    assert recipe.problems == ()
    assert [anchor.args for anchor in recipe.anchors] == [
        {"max_steps": 3, "seed": 1},
        {"max_steps": 3, "seed": 2},
        {"max_steps": 3, "seed": 2, "learning_rate": 1.0},
    ]


def test_merges_of_merges_are_no_trouble(tmp_path: Path) -> None:
    bomb = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{f'*a{n - 1},' * 9}]}}\n" for n in range(1, 30))
    recipe = _read(tmp_path, f"{bomb}source: s\ndata: d\nanchors: [0.5]\noutput_dir: out\nargs: *a29\n")
    assert "args.x: there is no such key." in recipe.problems


def test_yaml_that_was_dumped_reads_the_same(tmp_path: Path) -> None:
    raw = raw_recipe(tmp_path)
    recipe = _read(tmp_path, yaml.safe_dump(raw))
    assert recipe.problems == () and recipe.anchors == parse_recipe(raw, "some").anchors
