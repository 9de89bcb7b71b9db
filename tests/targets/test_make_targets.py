"""Many sizes in one pass: each as from_chain makes it, loaded once a pair, resumable, no failure losing the others."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_trl import Chain, from_chain, make_targets
from cbd_trl.chain import folders
from cbd_trl.targets import many as module
from cbd_trl.targets.from_chain import load_pair
from tests.chain.helpers import chain_rows, same_weights


def sizes_of(chain, *shares):
    """Sizes between the last two anchors."""
    upper, lower = (anchor.num_parameters for anchor in chain.anchors[1:])
    return [lower + share * (upper - lower) for share in shares]


def test_each_is_what_from_chain_makes(chain, tmp_path):
    sizes = [*sizes_of(chain, 0.3, 0.6), chain.anchors[0].num_parameters]
    made = make_targets(chain, sizes, tmp_path / "models", tolerance=0.1)
    assert [target.requested for target in made] == sizes
    assert not any(target.kept or target.error for target in made)
    assert [target.directory.parent for target in made] == [tmp_path / "models"] * 3
    for size, target in zip(sizes, made, strict=True):
        model = AutoModelForCausalLM.from_pretrained(target.directory)
        expected = from_chain(chain, size, tolerance=0.1)
        assert same_weights(dict(model.state_dict()), dict(expected.state_dict()))
        assert model.config.cbd_trl == target.provenance
        assert {**expected.config.cbd_trl, "request": target.provenance["request"]} == target.provenance
        AutoTokenizer.from_pretrained(target.directory)


def test_folders_are_named_as_anchors_are(chain, tmp_path):
    sizes = [*sizes_of(chain, 0.3, 0.6), chain.anchors[0].num_parameters, chain.anchors[0].num_parameters + 1]
    names = [target.directory.name for target in make_targets(chain, sizes, tmp_path, tolerance=0.1)]
    assert all(name.endswith("K") for name in names[:2])
    assert names[2:] == [str(size) for size in sizes[2:]]


def test_files_are_checked_once_and_a_pair_is_loaded_once(chain, chain_folder, tmp_path, monkeypatch):
    loaded, hashed, hash_file = [], [], folders.sha256_of

    def load(upper, lower):
        loaded.append((upper.name, lower.name))
        return load_pair(upper, lower)

    def count(path):
        hashed.append(path)
        return hash_file(path)

    monkeypatch.setattr(module, "load_pair", load)
    monkeypatch.setattr(folders, "sha256_of", count)
    low, middle, high = (anchor.num_parameters for anchor in reversed(chain.anchors))
    sizes = [low + 0.4 * (middle - low), middle + 0.5 * (high - middle), low + 0.6 * (middle - low)]
    made = make_targets(chain_folder, sizes, tmp_path, tolerance=0.3)
    assert not any(target.error for target in made)
    names = [anchor.name for anchor in chain.anchors]
    assert loaded == [(names[0], names[1]), (names[1], names[2])]
    assert len(hashed) == len(set(hashed)) == sum(len(anchor.files) for anchor in chain.anchors)


def test_a_failing_size_loses_no_other(chain, tmp_path):
    good, bad = sizes_of(chain, 0.5)[0], 10**9
    made = make_targets(chain, [bad, good], tmp_path / "models", tolerance=0.1)
    assert "num_parameters=1,000,000,000 lies outside the chain" in made[0].error and made[0].provenance is None
    assert made[1].error is None and made[1].provenance["num_parameters"] > 0
    assert [path.name for path in (tmp_path / "models").iterdir()] == [made[1].directory.name]


def test_a_foreign_folder_is_left_alone(chain, tmp_path):
    first, second = sizes_of(chain, 0.3, 0.6)
    names = [target.directory for target in make_targets(chain, [first, second], tmp_path / "a", tolerance=0.1)]
    mine = tmp_path / "b" / names[0].name
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    made = make_targets(chain, [first, second], tmp_path / "b", tolerance=0.1)
    assert "holds something other than a model that from_chain saved" in made[0].error and made[1].error is None
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]


def stamps(made):
    return [(target.directory / "model.safetensors").stat().st_mtime_ns for target in made]


def test_finished_models_are_kept_and_an_interrupted_run_goes_on(chain, tmp_path, monkeypatch):
    sizes, options = sizes_of(chain, 0.3, 0.6), {"tolerance": 0.1, "config": {"num_attention_heads": 4}}
    save = module.save_model

    def interrupted(model, anchor, directory):
        if any((tmp_path / "models").iterdir() if (tmp_path / "models").exists() else []):
            raise KeyboardInterrupt
        save(model, anchor, directory)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_targets(chain, sizes, tmp_path / "models", **options)
    made = make_targets(chain, sizes, tmp_path / "models", **options)
    # The largest is made first.
    assert [target.kept for target in made] == [False, True]
    before = stamps(made)
    again = make_targets(chain, sizes, tmp_path / "models", **options)
    assert all(target.kept for target in again) and stamps(again) == before
    assert [target.provenance for target in again] == [target.provenance for target in made]


@pytest.mark.parametrize(
    "change",
    [
        {"operator": "slice"},
        {"alpha": 0.5},
        {"dtype": "bfloat16"},
        {"tolerance": 0.2},
        {"config": {"num_attention_heads": 4}},
        {"calibration_dataset": chain_rows(4)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_arguments_make_it_again(chain, tmp_path, change):
    sizes = sizes_of(chain, 0.5)
    make_targets(chain, sizes, tmp_path, tolerance=0.1)
    for expected in (False, True):
        (target,) = make_targets(chain, sizes, tmp_path, **{"tolerance": 0.1, **change})
        assert target.kept is expected and target.error is None


def test_another_chain_makes_it_again(chain, tmp_path):
    sizes = sizes_of(chain, 0.5)
    make_targets(chain, sizes, tmp_path / "models", tolerance=0.1)
    chain.save_pretrained(tmp_path / "copy")
    copied = Chain.from_pretrained(tmp_path / "copy")
    # The same chain in another place is the same chain.
    assert make_targets(copied, sizes, tmp_path / "models", tolerance=0.1)[0].kept
    copied.checksum = "of other files"
    assert not make_targets(copied, sizes, tmp_path / "models", tolerance=0.1)[0].kept


def test_calibration_text_is_read_once_and_told(chain, tmp_path):
    sizes = [*sizes_of(chain, 0.3, 0.6), chain.anchors[1].num_parameters]
    text = chain_rows(30, seed=5)
    made = make_targets(chain, sizes, tmp_path, tolerance=0.1, calibration_dataset=text)
    for size, target in zip(sizes[:2], made, strict=False):
        expected = from_chain(chain, size, tolerance=0.1, calibration_dataset=text)
        assert {**expected.config.cbd_trl, "request": target.provenance["request"]} == target.provenance
        assert target.provenance["calibration_tokens"] > 0 and target.provenance["calibration_tokens"] % 64 == 0
    assert made[2].provenance["operator"] == "anchor" and "calibration_tokens" not in made[2].provenance
    assert made[0].provenance["request"]["calibration"] == made[1].provenance["request"]["calibration"] is not None


@pytest.mark.parametrize("sizes", [5e4, "50K"])
def test_a_single_size_is_to_stand_in_a_list(chain, tmp_path, sizes):
    with pytest.raises(TypeError, match=r"sizes is .* must be a list"):
        make_targets(chain, sizes, tmp_path / "models")


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([], {}, r"sizes .*\[\]"),
        ([5e4, 5e4], {}, "sizes must name different numbers"),
        ([5e4, -1], {}, "num_parameters=-1 "),
        ([5e4], {"operator": "merge"}, "'merge'"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(chain, tmp_path, sizes, options, message):
    with pytest.raises(ValueError, match=message):
        make_targets(chain, sizes, tmp_path / "models", **options)
    assert not (tmp_path / "models").exists()


def test_provenance_says_what_was_asked(chain, tmp_path):
    (size,) = sizes_of(chain, 0.5)
    (target,) = make_targets(chain, [size], tmp_path, tolerance=0.1, dtype=torch.bfloat16)
    provenance = json.loads((target.directory / "config.json").read_text())["cbd_trl"]
    assert provenance["request"] == {
        "chain": chain.checksum, "num_parameters": size, "config": None, "operator": "nested", "alpha": None,
        "tolerance": 0.1, "shape_search": None, "dtype": "torch.bfloat16", "calibration": None,
    }  # fmt: skip
