"""A recipe is read: what is wrong with the file is said at once, each with its line and its place."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cbd_trl.cli.main import main
from cbd_trl.recipe.read import parse_recipe, read_recipe
from cbd_trl.recipe.schema import AnchorPart, DataPart, Place, RecipeError, lines_of
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
        "anchors: [{size: 85M, args: {learning_rate: 4e-4}, data: b.jsonl}, 0.5, {shape: {num_hidden_layers: 2}}]\n"
        "output_dir: out\n"
        "args: {max_steps: 5, save_strategy: no, learning_rate: 1}\n"
    )
    recipe = _read(tmp_path, text)
    assert recipe.problems == () and recipe.name == "some" and recipe.output_dir == "out"
    assert recipe.source == Place("me/model", "v1")
    assert recipe.data == (
        DataPart("a.jsonl", share=3.0, where="data[0]"),
        DataPart("me/data", "en", "train[:90%]", "body", 1.0, "data[1]"),
    )
    own = DataPart("b.jsonl", where="anchors[0].data")
    # YAML reads 4e-4, without a dot, as text, and a bare `no` as false.
    assert recipe.anchors == (
        AnchorPart(85e6, {"learning_rate": 4e-4}, (own,)),
        AnchorPart(0.5),
        AnchorPart({"num_hidden_layers": 2}),
    )
    assert recipe.args == {"max_steps": 5, "save_strategy": "no", "learning_rate": 1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ancors": []}, "ancors: there is no such key. Did you mean 'anchors'? There are: source, data, anchors"),
        ({"args": {"learning_rat": 1.0}}, "args.learning_rat: there is no such key. Did you mean 'learning_rate'?"),
        ({"args": {"output_dir": "x"}}, "args.output_dir: there is no such key."),
        ({"args": {"max_steps": "many"}}, "args.max_steps: 'many' is a str, wanted int."),
        ({"args": {"max_steps": 2.5}}, "args.max_steps: 2.5 is a float, wanted int."),
        ({"args": {"packing": 1}}, "args.packing: 1 is a int, wanted bool."),
        ({"args": {"learning_rate": True}}, "args.learning_rate: True is a bool, wanted float."),
        ({"args": [1]}, "args: [1] is no mapping."),
        ({"source": 7}, "source: 7 is no mapping. Write it with the keys name, revision."),
        ({"source": {"name": "s", "revison": "v1"}}, "source.revison: there is no such key. Did you mean 'revision'?"),
        ({"source": None}, "source: is missing."),
        ({"data": []}, "data: the list is empty."),
        ({"data": [{"name": "a"}, {"name": "b", "share": 1}]}, "data[0].share: is missing."),
        ({"data": {"name": "a", "share": 0}}, "data.share: 0 is no number above 0."),
        ({"data": {"name": "a", "split": 3}}, "data.split: 3 is no text."),
        ({"anchors": []}, "anchors: the list is empty."),
        ({"anchors": ["big"]}, "anchors[0]: 'big' is no number above 0. Write 44e6, 44M or 0.5."),
        ({"anchors": [{"args": {}}]}, "anchors[0]: one of shape, size, ratio says how large it is; there are 0"),
        ({"anchors": [{"size": 5e6, "ratio": 0.5}]}, "anchors[0]: one of shape, size, ratio says how large it is; "),
        ({"anchors": [{"ratio": 2}]}, "anchors[0].ratio: 2 is not a ratio to the anchor above, below 1."),
        ({"anchors": [{"size": 0.5}]}, "anchors[0].size: 0.5 is not a number of parameters, such as 44M."),
        ({"anchors": [{"shape": 16}]}, "anchors[0].shape: 16 is no mapping of config fields."),
        ({"anchors": [{"shape": {"n": 1, "dataset": "x"}}]}, "anchors[0].shape.dataset: is no config field."),
        ({"anchors": [{"shap": {"n": 1}}]}, "anchors[0].shap: there is no such key. Did you mean 'shape'?"),
        ({"bridge": {"args": {}}}, "bridge.model: is missing."),
        ({"bridge": {"model": "m", "args": {"objectiv": "alm"}}}, "bridge.args.objectiv: there is no such key. Did y"),
        ({"evaluation": {"tokens": 640}}, "evaluation.data: is missing."),
        ({"evaluation": {"data": "d", "sizes": ["x"]}}, "evaluation.sizes[0]: 'x' is no number above 0."),
        ({"evaluation": {"data": "d", "tokens": 10, "length": 20}}, "evaluation.tokens: 10 are fewer than the 20"),
        ({"calibration_tokens": True}, "calibration_tokens: True is no whole number of at least 2."),
        ({"output_dir": 5}, "output_dir: 5 is no text."),
    ],
)
def test_one_thing_is_wrong(changes: dict[str, Any], said: str) -> None:
    problems = _problems(**changes)
    if changes == {"source": None}:
        raw = raw_recipe(Path("folder"))
        del raw["source"]
        problems = parse_recipe(raw, "some").problems
    found = [problem for problem in problems if problem.startswith(said)]
    assert len(found) == 1 and len(problems) == 1, problems


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
    assert "5 things are to be put right" in shown
    assert "line 6, anchors[0].args.divergense: there is no such key. Did you mean 'divergence'?" in shown
    assert "line 7, anchors[1].ratio: 3 is not a ratio" in shown
    assert "line 9, args.max_steps: 'lots' is a str" in shown
    assert "line 1, source: " in shown and "line 2, data: there is no file missing.jsonl" in shown
    assert shown.rstrip().endswith("--set KEY=VALUE, such as --set source=DIR.")


def test_a_place_without_a_line_has_that_of_what_it_is_part_of() -> None:
    lines = lines_of("a:\n  - b: 1\n    c: {d: 2}\n")
    assert lines == {"a": 1, "a[0]": 2, "a[0].b": 2, "a[0].c": 3, "a[0].c.d": 3}
    error = RecipeError("r", ["a[0].c.e: x", "a[1]: y", "z: w", "other words"], lines)
    assert "- line 3, a[0].c.e: x\n  - line 1, a[1]: y\n  - z: w\n  - other words" in str(error)


def test_a_value_that_was_set_has_no_line(tmp_path: Path) -> None:
    recipe = _read(tmp_path, SHORT, "anchors[0]=0.7", "args.max_steps=3", "source=DIR")
    assert recipe.anchors == (AnchorPart(0.7),) and recipe.args == {"max_steps": 3}
    assert recipe.source == Place("DIR")
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
        ("just words\n", "holds no mapping"),
        ("- a\n- b\n", "holds no mapping"),
        ("", "holds no mapping"),
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
