"""A build that is run again, interrupted, or asked for what cannot be built."""

import shutil

import pytest
from datasets import Dataset
from transformers import BloomConfig, BloomForCausalLM

import cbd_trl.build.build as build_module
import cbd_trl.build.source_anchor as head_module
from cbd_trl import Chain, build_chain
from cbd_trl.architectures import describe
from cbd_trl.build.plan import plan_chain
from tests.chain.helpers import CHAIN_ANCHORS, chain_config, chain_rows, chain_source, same_weights
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer


def build(folder, source=None, anchors=CHAIN_ANCHORS, **options):
    """The same call as the one behind the `chain` fixture, unless told otherwise."""
    options = {"dataset": chain_rows(), "eval_dataset": chain_rows(4, seed=9), "args": chain_config(), **options}
    options = {"processing_class": tiny_tokenizer(), "calibration_tokens": 256, **options}
    source = chain_source() if source is None else source
    return build_chain(source, anchors, output_dir=folder, **options)


@pytest.fixture
def copied(chain_folder, tmp_path):
    """A copy of the finished chain that a test may go on with."""
    return shutil.copytree(chain_folder, tmp_path / "chain")


@pytest.fixture
def no_training(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("trained or measured again")

    monkeypatch.setattr(build_module, "DistillTrainer", fail)
    monkeypatch.setattr(build_module, "store_anchor", fail)
    monkeypatch.setattr(head_module, "collect_statistics", fail)


def test_a_finished_chain_is_not_touched(copied, no_training):
    files = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    chain = build(copied)
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()} == files
    assert len(chain.anchors) == 3


@pytest.mark.parametrize("after", [0, 1, 2, 4])
def test_an_interrupted_build_goes_on(after, chain, tmp_path, interrupted):
    """In the first anchor before and after a checkpoint, and in the second."""
    interrupted(after)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "chain")
    assert [anchor.name for anchor in Chain.from_pretrained(tmp_path / "chain").anchors] == ["49K", "33K"][
        : 1 + after // 3
    ]
    steps = interrupted(None)
    resumed = build(tmp_path / "chain")
    # Three steps an anchor; those before the interruption are not taken again.
    assert steps == [0, 1, 2, 0, 1, 2][after:]
    for ours, theirs in zip(resumed.anchors, chain.anchors, strict=True):
        assert same_weights(ours.load_state_dict(), theirs.load_state_dict())
        assert (ours.tokens_seen, ours.losses, ours.training) == (theirs.tokens_seen, theirs.losses, theirs.training)
        assert list(ours.losses) == list(theirs.losses)  # the same bytes in chain.json


def test_checkpoints_of_other_settings_are_kept_and_not_gone_on_from(tmp_path, interrupted):
    folder, begun = tmp_path / "chain", {"args": chain_config(learning_rate=0.02)}
    interrupted(2)
    with pytest.raises(KeyboardInterrupt):
        build(folder, **begun)
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    steps = interrupted(None)
    changed = r"changed: \['learning_rate'\] \(there: 0.02; now: 0.01\)\. Request those"
    asked = rf"unfinished training of the anchor 33K \(checkpoint-2\), .*{changed}"
    with pytest.raises(ValueError, match=asked):
        build(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == files
    build(folder, **begun)
    assert steps == [2, 0, 1, 2]


def test_without_a_checkpoint_other_settings_begin_anew(tmp_path, interrupted):
    interrupted(0)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "chain", args=chain_config(learning_rate=0.02))
    steps = interrupted(None)
    chain = build(tmp_path / "chain", anchors=CHAIN_ANCHORS[:1])
    assert steps == [0, 1, 2] and chain.anchors[1].arguments["learning_rate"] == 0.01


def test_a_chain_can_be_made_longer(chain, copied, interrupted):
    steps = interrupted(None)
    longer = build(copied, anchors=[*CHAIN_ANCHORS, {"num_hidden_layers": 3}])
    assert steps == [0, 1, 2] and len(longer.anchors) == 4
    assert longer.anchors[3].parent == "8.8K" and longer.anchors[3].block_map == [[0], [1, 2], [3]]
    assert [anchor.files for anchor in longer.anchors[:3]] == [anchor.files for anchor in chain.anchors]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"args": chain_config(learning_rate=5e-3)},
            r"anchor 33K .*changed arguments: \['learning_rate'\] \(there: 0.01; now: 0.005\)\.",
        ),
        ({"args": chain_config(hidden_weight=1.0)}, r"changed arguments: \['hidden_weight'\]"),
        (
            {"args": chain_config(completion_only_loss=False, neftune_noise_alpha=1.0, data_seed=3)},
            r"changed arguments: \['neftune_noise_alpha', 'data_seed', 'completion_only_loss'\]",
        ),
        (
            {"args": chain_config(top_k=8, kd_schedule="linear", kd_weight_end=0.5, hidden_loss="cosine")},
            r"changed arguments: \['kd_schedule', 'kd_weight_end', 'top_k', 'hidden_loss'\]",
        ),
        ({"calibration_tokens": 128}, r"anchor 49K .*changed: \['calibration_tokens'\] \(there: \d+; now: 128\)"),
        (
            {"args": chain_config(model_init_kwargs={"dtype": "bfloat16"})},
            r"anchor 49K .*changed: \['model_init_kwargs'\]",
        ),
        ({"anchors": [{"num_hidden_layers": 5}]}, r"more anchors \(49K, 33K, 8.8K\) than requested now"),
        ({"anchors": CHAIN_ANCHORS[:1]}, r"more anchors \(49K, 33K, 8.8K\) than requested now"),
        (
            {"anchors": [{"num_hidden_layers": 5}, {"num_hidden_layers": 4}]},
            r"the anchor 33K .*built with other settings",
        ),
        ({"source": tiny_model("llama", num_hidden_layers=5)}, r"a chain of another source .*'num_hidden_layers': 5"),
        (
            {"source": tiny_model("llama", seed=3, tie_word_embeddings=True, num_hidden_layers=6)},
            r"a chain of another source .*'weights_sha256'",
        ),
    ],
)
def test_what_does_not_go_with_the_chain_there_is_refused(copied, no_training, changes, message):
    before = (copied / "chain.json").read_text()
    with pytest.raises(ValueError, match=rf"already holds .*{message}.*Choose another output_dir, or delete"):
        build(copied, **changes)
    assert (copied / "chain.json").read_text() == before


def test_another_folder_is_another_source(tmp_path, interrupted):
    for name in ("one", "two"):
        chain_source().save_pretrained(tmp_path / name)
    args = chain_config(max_steps=1)
    build(tmp_path / "chain", str(tmp_path / "one"), CHAIN_ANCHORS[:1], args=args)
    steps = interrupted(None)
    build(tmp_path / "chain", tmp_path / "one", CHAIN_ANCHORS[:1], args=args)
    assert steps == []
    with pytest.raises(ValueError, match=r"a chain of another source .*one.*requested: .*two"):
        build(tmp_path / "chain", tmp_path / "two", CHAIN_ANCHORS[:1], args=args)
    # By what it is, and not where it lies.
    moved = shutil.copytree(tmp_path / "one", tmp_path / "elsewhere" / "one")
    build(tmp_path / "chain", moved, CHAIN_ANCHORS[:1], args=args)
    assert steps == []
    tiny_model("llama", seed=3, tie_word_embeddings=True, num_hidden_layers=6).save_pretrained(moved)
    with pytest.raises(ValueError, match=r"a chain of another source .*one@.*requested: .*one@"):
        build(tmp_path / "chain", moved, CHAIN_ANCHORS[:1], args=args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anchors": []}, r"No anchors were requested. Give at least one, for example anchors=\["),
        (
            {"anchors": [{"num_hidden_layers": 6}]},
            r"anchors\[0\] has 48,544 parameters, no fewer than .*large to small",
        ),
        (
            {"anchors": [{"num_hidden_layers": 4}, {"num_hidden_layers": 5}]},
            r"num_hidden_layers=5 is larger than the 4",
        ),
        ({"anchors": [{"num_hidden_layers": 7}]}, r"num_hidden_layers=7 is larger than the 6"),
        ({"anchors": [{"layers": 4}]}, r"'layers' is not a shape field of llama. Shape fields: num_hidden_layers"),
        ({"anchors": [{"num_hidden_layers": 4.0}]}, r"num_hidden_layers must be a positive integer, got 4.0"),
        (
            {"anchors": [0]},
            r"anchors\[0\] is 0\. Give a dict of config fields, a parameter count above 1, a ratio .* or a model",
        ),
        ({"anchors": [0.5, -2]}, r"anchors\[1\] is -2"),
        ({"anchors": [True]}, r"anchors\[0\] is True"),
        (
            {"anchors": ["16M"]},
            r"anchors\[0\] is the text '16M', which would be the name of a model\. A size is a number: 16e6\.",
        ),
        ({"anchors": [float("nan")]}, r"anchors\[0\] is nan"),
        ({"anchors": [1.0]}, r"a ratio between 0 and 1, got 1.0"),
        ({"anchors": [1e9]}, r"below the 48,544 of the anchor above.*got 1000000000.0"),
        ({"anchors": [0.001]}, r"No anchor of about 49 parameters can be cut"),
        (
            {"source": BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2))},
            r"Model type 'bloom' has no description.*Supported model types: .*gemma2, gemma3_text",
        ),
        (
            {"source": "no/such-model-anywhere"},
            r"The source 'no/such-model-anywhere' is not a model folder and could not",
        ),
        ({"processing_class": None}, r"No tokenizer could be loaded from the source .*Pass `processing_class`"),
        ({"dataset": Dataset.from_dict({"story": ["w1 w2"]})}, r"columns \['story'\], and none of the SFT formats"),
        ({"dataset": Dataset.from_dict({"text": []})}, r"dataset is empty"),
        (
            {"anchors": [CHAIN_ANCHORS[0], {**CHAIN_ANCHORS[1], "dataset": Dataset.from_dict({"story": ["w1"]})}]},
            r"columns \['story'\], and none of the SFT formats",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_written(tmp_path, no_training, changes, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "chain", **changes)
    assert not (tmp_path / "chain").exists()


@pytest.mark.parametrize("name", ["49K", "8.8K"])
def test_what_is_in_the_place_of_an_anchor_stays(name, tmp_path, no_training):
    mine = tmp_path / "chain" / name / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("work of years")
    message = rf"{name} is there already, and no anchor of a chain \(it has no statistics.safetensors\)"
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "chain")
    assert mine.read_text() == "work of years" and [*(tmp_path / "chain").iterdir()] == [mine.parent]


def test_what_is_in_the_place_of_a_further_anchor_stays(copied, no_training):
    shorter = [*CHAIN_ANCHORS, {"num_hidden_layers": 2}]
    mine = copied / plan_chain(describe(chain_source().config), shorter, chain_config(), None)[-1].name / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("work of years")
    with pytest.raises(ValueError, match="is there already, and no anchor of a chain"):
        build(copied, anchors=shorter)
    assert mine.read_text() == "work of years"


def test_a_file_is_no_folder(tmp_path, no_training):
    (tmp_path / "chain").write_text("mine")
    with pytest.raises(ValueError, match=r"chain is a file, and a chain is a folder. Choose another output_dir"):
        build(tmp_path / "chain")


def test_anchors_of_like_size_get_names_of_their_own():
    source = describe(chain_source().config)
    fields = [{"num_hidden_layers": 4}, {"intermediate_size": 47}, {"intermediate_size": 46}]
    steps = plan_chain(source, fields, chain_config(), chain_rows())
    assert [step.name for step in steps] == ["33K", "33K-2", "32K"]
    assert [step.args.swap_probability for step in steps] == [0.5, 0.0, 0.0]
