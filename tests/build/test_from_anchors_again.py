"""Models that do not go together, and a chain of existing models that is asked for again."""

import shutil

import pytest

import cbd_trl.build.from_anchors as coordinates_module
import cbd_trl.build.from_anchors as from_anchors_module
from cbd_trl import Chain
from cbd_trl.architectures import describe
from cbd_trl.build.compatibility import paired_layers
from cbd_trl.chain.manifest import Manifest, write_manifest
from tests.build.apart import NARROW, make, sizes
from tests.chain.helpers import chain_rows, same_weights
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

NEIGHBOURS = [
    ({"hidden_size": 40}, r"anchors\[1\] has more channels \(40\) than anchors\[0\] above it \(32\)"),
    ({"num_hidden_layers": 5}, r"anchors\[1\] has more layers \(5\) than anchors\[0\] above it \(4\)"),
    ({"num_key_value_heads": 4}, r"more key/value heads \(4\) than anchors\[0\] above it \(2\).*Leave one"),
    ({"num_key_value_heads": 1}, r"more query heads per key/value head \(4\) than anchors\[0\] above it \(2\)"),
    ({"head_dim": 4}, r"anchors\[0\] and anchors\[1\] differ in their head size: 8 and 4\. .*rotary.*Leave one"),
    ({"rope_theta": 1e3}, r"not compatible: under the first one's config, with its own sizes, the second has other "
     r"logits. The configs differ in .*rope.*1000"),
    ({"hidden_act": "gelu"}, r"other logits. The configs differ in .*'hidden_act': \('silu', 'gelu'\)"),
    ({"mlp_bias": True}, r"other tensors. The configs differ in .*'mlp_bias': \(False, True\)"),
    ({"vocab_size": 59}, r"anchors\[1\] has 59 vocabulary rows, but the highest id of the tokenizer .* is 59"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), NEIGHBOURS)
def test_anchors_that_do_not_go_together(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "chain", sizes(**fields))
    assert not (tmp_path / "chain").exists()


def test_a_norm_epsilon_of_its_own_is_no_obstacle(tmp_path):
    chain = make(tmp_path / "chain", sizes(rms_norm_eps=1e-5))
    assert [anchor.config().rms_norm_eps for anchor in chain.anchors] == [1e-6, 1e-5]


@pytest.mark.parametrize(
    ("upper", "lower", "message"),
    [
        (
            "FSFS",
            "SF",
            r"Layer 1 of lower has layer_types full_attention, but it is paired with layer 3 .* of 2 layers",
        ),
        # The third full layer above is its last, which is paired with the last one below.
        ("SFSFSF", "FFFF", r"Layer 2 of lower .* upper has no layer of this type left for it, .* of 2, 4 layers with"),
        (
            "SSSF",
            "FF",
            r"Layer 0 of lower .* left for it, in order\. .* Give another anchor; or distill one from upper",
        ),
    ],
)
def test_layers_of_other_kinds_are_refused(upper, lower, message):
    """Naming the layer, why, and how many layers would do."""
    kinds = {"S": "sliding_attention", "F": "full_attention"}
    above, below = (
        describe(
            tiny_model(
                "qwen2",
                use_sliding_window=True,
                sliding_window=4,
                num_hidden_layers=len(letters),
                layer_types=[kinds[letter] for letter in letters],
            ).config
        )
        for letters in (upper, lower)
    )
    with pytest.raises(ValueError, match=message):
        paired_layers(("upper", "lower"), above, below)


@pytest.mark.parametrize(
    ("anchors", "message"),
    [
        ([], r"A chain needs two anchors or more, got 0"),
        ([tiny_model("llama")], r"A chain needs two anchors or more, got 1. Give models, paths or Hub ids"),
        ([tiny_model("llama"), tiny_model("gpt2")], r"of the model types llama, gpt2. A target is one stock model"),
        (sizes()[::-1], r"anchors\[1\] has .* parameters, no fewer than the .* List anchors from large to small"),
        ([tiny_model("llama"), "no/such-model-anywhere"], r"'no/such-model-anywhere' is not a model folder"),
        (
            [tiny_model("gpt2"), tiny_model("gpt2", n_layer=2, n_positions=32)],
            r"differ in their number of learned pos",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_written(anchors, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "chain", anchors)
    assert not (tmp_path / "chain").exists()


def test_what_is_in_the_place_of_an_anchor_stays(tmp_path):
    models = sizes()
    names = [anchor.name for anchor in make(tmp_path / "first", models).anchors]
    mine = tmp_path / "chain" / names[1] / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("work of years")
    with pytest.raises(ValueError, match=rf"{names[1]} is there already, and no anchor of a chain"):
        make(tmp_path / "chain", models)
    assert mine.read_text() == "work of years" and [*(tmp_path / "chain").iterdir()] == [mine.parent]


def test_another_tokenizer_is_refused(tmp_path):
    sizes()[1].save_pretrained(tmp_path / "other")
    tiny_tokenizer([f"x{i}" for i in range(54)]).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"anchors\[1\] .*reads other tokens than .*54 of the chain's 60 tokens have"):
        make(tmp_path / "chain", [sizes()[0], tmp_path / "other"])


def test_a_folder_without_a_tokenizer_is_taken_to_share_the_chains(tmp_path):
    """transformers would make an empty one of a GPT-2's folder."""
    models = [tiny_model("gpt2"), tiny_model("gpt2", seed=1, n_layer=3)]
    models[1].save_pretrained(tmp_path / "lower")
    assert len(make(tmp_path / "chain", [models[0], tmp_path / "lower"]).anchors) == 2


def never(*args, **kwargs):
    raise AssertionError("looked at again")


def test_a_finished_chain_is_not_touched(tmp_path, monkeypatch):
    make(tmp_path / "chain", sizes())
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "chain").rglob("*")}
    monkeypatch.setattr(coordinates_module, "measured_model", never)
    monkeypatch.setattr(from_anchors_module, "store_anchor", never)
    assert len(make(tmp_path / "chain", sizes()).anchors) == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "chain").rglob("*")} == files


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupted_run_goes_on(after, align, tmp_path, monkeypatch):
    expected = make(tmp_path / "whole", sizes(), align=align)
    left, store = [None] * after, from_anchors_module.store_anchor

    def interrupted(*arguments):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return store(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(from_anchors_module, "store_anchor", interrupted)
        make(tmp_path / "chain", sizes(), align=align)
    if align:
        monkeypatch.setattr(coordinates_module, "match_models", never)
    resumed = make(tmp_path / "chain", sizes(), align=align)
    for ours, theirs in zip(resumed.anchors, expected.anchors, strict=True):
        assert same_weights(ours.load_state_dict(), theirs.load_state_dict())
        assert ours.training == theirs.training


def test_anchors_in_forgotten_coordinates_are_written_anew(tmp_path):
    first, second = make(tmp_path / "chain", sizes()).anchors
    write_manifest(tmp_path / "chain", Manifest(model_type="llama", versions={}, anchors=[first]))
    shutil.rmtree(second.path)
    before = (first.path / "model.safetensors").stat().st_mtime_ns
    assert len(make(tmp_path / "chain", sizes()).anchors) == 2
    assert (first.path / "model.safetensors").stat().st_mtime_ns > before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"align": False}, r"'aligned': \(True, False\)"),
        ({"dataset": chain_rows(60, seed=5)}, r"'text_sha256': "),
        ({"anchors": [sizes()[0], tiny_model("llama", seed=9, **NARROW)]}, r"'sources': "),
    ],
)
def test_a_folder_with_another_chain_is_refused(changes, named, tmp_path):
    make(tmp_path / "chain", sizes())
    before = (tmp_path / "chain" / "chain.json").read_text()
    with pytest.raises(
        ValueError, match=rf"already holds another chain.*{named}.*Choose another output_dir, or delete"
    ):
        make(tmp_path / "chain", changes.pop("anchors", None) or sizes(), **changes)
    assert (tmp_path / "chain" / "chain.json").read_text() == before
    assert len(Chain.from_pretrained(tmp_path / "chain").anchors) == 2
