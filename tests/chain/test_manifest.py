"""A chain on disk: written anchor by anchor, opened, copied; every damage refused with the file's name."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from cbd_trl.architectures import describe
from cbd_trl.chain.chain import STATISTICS_FILE, Chain, write_anchor
from cbd_trl.chain.manifest import AnchorRecord
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.surgery.blocks import blocks_of, spaced_layers
from tests.tiny import MIXTURES, WIDTH_OF_HEADS, by_head, own_names, tiny_model
from tests.tokenizer import tiny_tokenizer

BLOCKS = blocks_of(spaced_layers(4, 3))
NAMES = ["large", "middle", "small"]


def filler(model, statistics=True):
    def fill(folder):
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        if statistics:
            save_file({"moments": torch.ones(2)}, folder / STATISTICS_FILE)

    return fill


def models(family="llama", **overrides):
    """Three models of one family, each smaller than the one before."""
    large = tiny_model(family, **overrides)
    depth = describe(large.config).family.depth_field
    middle = tiny_model(family, seed=1, **{**overrides, depth: 3})
    heads, groups = (3, 3) if family in WIDTH_OF_HEADS else (2, 1)
    width = own_names(family, hidden_size=24, num_attention_heads=heads, num_key_value_heads=groups)
    config = cut_architecture(describe(middle.config), width).config
    torch.manual_seed(2)
    return [large, middle, type(large)(config).eval()]


def write(folder, family="llama", **overrides):
    """A chain of three anchors."""
    parent, blocks = None, None
    for name, model in zip(NAMES, models(family, **overrides), strict=True):
        record = {"name": name, "parent": parent, "blocks": blocks, "losses": {"kd": 0.5}, "training": {"seed": 1}}
        write_anchor(folder, record, filler(model))
        parent, blocks = name, BLOCKS if blocks is None else [[0], [1], [2]]
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write(tmp_path_factory.mktemp("original") / "chain")


@pytest.fixture
def folder(original, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "chain"))


def edit(folder, change, seal=True):
    """Change chain.json; sealed again with its checksum unless a test wants that to fail."""
    file = folder / "chain.json"
    body = json.loads(file.read_text())
    change(body)
    if seal and "checksum" in body:
        body.pop("checksum")
        body["checksum"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(body))


@pytest.mark.parametrize(("family", "tied"), by_head())
def test_what_is_written_is_read(family, tied, tmp_path):
    options = {"tie_word_embeddings": tied}
    chain = Chain.from_pretrained(write(tmp_path / "chain", family, **options))
    tokens = torch.arange(3, 12)[None]
    assert [anchor.name for anchor in chain.anchors] == NAMES
    assert chain.source is chain.anchors[0] and chain.model_type == family
    for anchor, model in zip(chain.anchors, models(family, **options), strict=True):
        loaded = anchor.load_model()
        assert type(loaded) is type(model) and not loaded.training
        if family in MIXTURES:
            loaded.set_experts_implementation("eager")
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        assert anchor.num_parameters == sum(parameter.numel() for parameter in model.parameters())
        assert anchor.shape == describe(model.config).shape == anchor.architecture().shape
        assert anchor.load_state_dict().keys() == set(anchor.architecture().state_shapes)
        assert anchor.load_weights().keys() == anchor.architecture().tensors.keys()
        assert loaded.name_or_path == str(anchor.path)
    assert not list((tmp_path / "chain").glob(".tmp-*"))


def test_records_hold_what_was_given(original):
    chain = Chain.from_pretrained(str(original))
    large, middle, _ = chain.anchors
    assert (large.parent, large.block_map, large.kept_layers) == (None, None, None)
    assert (middle.parent, middle.block_map, middle.kept_layers) == ("large", BLOCKS, spaced_layers(4, 3))
    assert (middle.losses, middle.training, middle.finished) == ({"kd": 0.5}, {"seed": 1}, True)
    assert set(chain.versions) == {"cbd-trl", "torch", "transformers", "trl"}
    assert chain.tokenizer().get_vocab() == tiny_tokenizer().get_vocab()
    assert middle.statistics_file == original / "middle" / STATISTICS_FILE
    assert chain["middle"] == middle
    assert chain.name_or_path == str(original)
    assert "middle" in repr(chain)
    with pytest.raises(ValueError, match=r"has no anchor 'tiny'. Anchors: large, middle, small"):
        chain["tiny"]


def test_stored_dtype_is_kept(tmp_path):
    write_anchor(tmp_path, {"name": "a"}, filler(tiny_model("gpt2").bfloat16()))
    anchor = Chain.from_pretrained(tmp_path).source
    assert anchor.dtype == "bfloat16" and anchor.load_model().dtype == torch.bfloat16
    assert anchor.load_model(dtype=torch.float32).dtype == torch.float32


def test_sharded_weights_are_read(tmp_path):
    model = tiny_model("llama")
    write_anchor(tmp_path, {"name": "a"}, lambda folder: model.save_pretrained(folder, max_shard_size="20KB"))
    anchor = Chain.from_pretrained(tmp_path).source
    assert len([name for name in anchor.files if name.endswith(".safetensors")]) > 1
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in anchor.load_state_dict().items())


def test_sizes_list_every_pair(original):
    sizes = Chain.from_pretrained(original).sizes()
    assert [(entry["upper"], entry["lower"]) for entry in sizes] == [("large", "middle"), ("middle", "small")]
    assert sizes[0]["shape"]["num_hidden_layers"] == [3, 4]
    assert sizes[1]["shape"]["hidden_size"][0] == 24


def test_pair_for(original):
    chain = Chain.from_pretrained(original)
    large, middle, small = chain.anchors
    between = (middle.num_parameters + small.num_parameters) / 2
    assert chain.pair_for(large.num_parameters) == chain.pair_for(large.num_parameters * 1.02) == (large, middle)
    assert chain.pair_for(between) == chain.pair_for(small.num_parameters * 0.98) == (middle, small)
    assert chain.pair_for(config={"num_hidden_layers": 4}) == (large, middle)
    assert chain.pair_for(config={"hidden_size": 24}) == (middle, small)
    sizes = f"{small.num_parameters:,} to {large.num_parameters:,} parameters"
    with pytest.raises(ValueError, match=rf"num_parameters={large.num_parameters * 2:,} lies outside .*{sizes}"):
        chain.pair_for(large.num_parameters * 2)
    with pytest.raises(ValueError, match=r"No two neighboring anchors .*num_hidden_layers=2\. .*large to middle"):
        chain.pair_for(config={"num_hidden_layers": 2})
    with pytest.raises(ValueError, match=r"num_parameters=.*, num_hidden_layers=4\. What"):
        chain.pair_for(between, config={"num_hidden_layers": 4})


def test_one_anchor_has_nothing_between(tmp_path):
    write_anchor(tmp_path, {"name": "a"}, filler(tiny_model("llama")))
    with pytest.raises(ValueError, match="has one anchor, nothing lies between"):
        Chain.from_pretrained(tmp_path).pair_for(1e5)


def test_save_pretrained_copies_the_chain(original, tmp_path):
    chain = Chain.from_pretrained(original)
    (tmp_path / "copy").mkdir()
    for _ in range(2):
        chain.save_pretrained(tmp_path / "copy")
        copy = Chain.from_pretrained(tmp_path / "copy")
        assert [anchor.files for anchor in copy.anchors] == [anchor.files for anchor in chain.anchors]
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["README.md", "chain.json", *NAMES]
    chain.save_pretrained(original)
    Chain.from_pretrained(original)


def test_save_pretrained_overwrites_nothing_else(original, tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="exists and is not a chain; nothing there is overwritten"):
        Chain.from_pretrained(original).save_pretrained(tmp_path)


def test_an_interrupted_write_leaves_the_chain_whole(folder):
    def fail(temporary):
        (temporary / "config.json").write_text("{}")
        raise KeyboardInterrupt

    record = {"name": "tiny", "parent": "small", "blocks": [[0], [1, 2]]}
    with pytest.raises(KeyboardInterrupt):
        write_anchor(folder, record, fail)
    assert [anchor.name for anchor in Chain.from_pretrained(folder).anchors] == NAMES
    small = tiny_model("llama", num_hidden_layers=2, hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    write_anchor(folder, record, filler(small))
    assert [anchor.name for anchor in Chain.from_pretrained(folder).anchors] == [*NAMES, "tiny"]


def test_writing_an_anchor_again_drops_what_was_cut_from_it(folder):
    write_anchor(folder, {"name": "middle", "parent": "large", "blocks": BLOCKS}, filler(models()[1]))
    assert [anchor.name for anchor in Chain.from_pretrained(folder).anchors] == ["large", "middle"]


@pytest.mark.parametrize(
    ("record", "model", "message"),
    [
        ({"parent": "huge"}, 2, "'new' has the parent 'huge', which is not there. Anchors: large, middle, small"),
        ({"parent": "middle", "blocks": [[0], [1]]}, 2, r"chain\.json: anchor 'new': The block map must split"),
        ({"parent": "middle"}, 2, r"chain\.json: anchor 'new' has a parent but no blocks"),
        ({"parent": "small", "blocks": [[0]]}, 0, "anchors must be listed largest first"),
        ({"name": "../new"}, 0, r"name: .*'\.\./new'"),
    ],
)
def test_records_that_do_not_fit(folder, record, model, message):
    with pytest.raises(ValueError, match=message):
        write_anchor(folder, {"name": "new", **record}, filler(models()[model]))
    assert len(Chain.from_pretrained(folder).anchors) == 3


def test_a_folder_without_a_model_is_no_anchor(tmp_path):
    with pytest.raises(ValueError, match=r"was filled without config.json or model.safetensors.*Files: notes.txt"):
        write_anchor(tmp_path, {"name": "a"}, lambda folder: (folder / "notes.txt").write_text(""))


def test_double_precision_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model.safetensors holds F64 weights. Chains store float32, bfloat16"):
        write_anchor(tmp_path, {"name": "a"}, filler(tiny_model("llama").double()))


def test_not_a_chain(tmp_path):
    with pytest.raises(ValueError, match=r"chain\.json does not exist: .* is not a chain"):
        Chain.from_pretrained(tmp_path)
    for missing in (tmp_path / "none", str(tmp_path / "none")):
        with pytest.raises(ValueError, match=r"There is no folder .*none\. Give the folder"):
            Chain.from_pretrained(missing)


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ("[]", "must hold a JSON object, got list")])
def test_damaged_manifest(folder, text, message):
    (folder / "chain.json").write_text(text)
    with pytest.raises(ValueError, match=rf"chain\.json {message}"):
        Chain.from_pretrained(folder)


MANIFEST_EDITS = [
    (
        lambda body: body.update(schema_version=3),
        r"schema_version 3; this version of cbd-trl reads 5",
    ),
    (lambda body: body.pop("schema_version"), r"schema_version None"),
    (lambda body: body.pop("model_type"), r"model_type: the field is missing"),
    (lambda body: body.pop("checksum"), r"checksum: the field is missing"),
    (lambda body: body.update(extra=1), r"extra: there is no field of this name"),
    (lambda body: body.update(anchors={}), r"anchors: .*got \{\}"),
    (lambda body: body.update(anchors=[]), r"must list at least one anchor"),
    (lambda body: body.update(model_type="mistral"), r"config.json is of model type 'llama', .*says 'mistral'"),
    (lambda body: body["anchors"].append(3), r"anchors\[3\]: .*got 3"),
    (lambda body: body["anchors"].append(body["anchors"][0]), r"no name twice"),
    (lambda body: body["anchors"].reverse(), r"'small' has parent 'middle', expected None, the anchor above"),
    (lambda body: body["anchors"].pop(0), r"'middle' has parent 'large', expected None"),
]


def block(*layers, **values):
    return {"layers": list(layers), "kept": layers[-1], "cost": None, **values}


ANCHOR_EDITS = [
    ({"parent": "huge"}, r"'middle' has parent 'huge', expected 'large'"),
    ({"num_parameters": "many"}, r"anchors\[1\]\.num_parameters: .*'many'"),
    ({"num_parameters": True}, r"anchors\[1\]\.num_parameters: .*True"),
    ({"num_parameters": 10**6}, r"largest first, but 'middle' has 1,000,000"),
    ({"num_parameters": 30000}, r"config.json has the shape .* but .*chain.json records .*\(30,000\)"),
    ({"shape": {"num_hidden_layers": 5}}, r"middle.config.json has the shape .* but .*chain.json records"),
    ({"shape": {"num_hidden_layers": "5"}}, r"\.shape\.num_hidden_layers: .*'5'"),
    ({"losses": {"kd": None}}, r"\.losses\.kd: .*None"),
    ({"dtype": "int8"}, r"\.dtype: .*'int8'"),
    ({"tokenizer_sha256": "x"}, r"\.tokenizer_sha256: .*'x'"),
    ({"blocks": [0, 1, 2]}, r"\.blocks\[0\]: .*0"),
    ({"blocks": None}, r"'middle' has a parent but no blocks"),
    ({"blocks": [block(0), block(1), block(2)]}, r"anchor 'middle': The block map must split .* 4 layers"),
    ({"blocks": [block(0, 1), block(2), block(3, kept=2)]}, r"\.blocks\[2\]: kept must be one of .*\[3\], got 2"),
    ({"blocks": [block(0, 1), block(2), block(3, kept=None)]}, r"\.blocks\[2\]\.kept: .*None"),
    ({"blocks": [block(0, 1), block(2), block(3, kept=True)]}, r"\.blocks\[2\]\.kept: .*True"),
    ({"blocks": [block(0, 1, cost=0.5), block(2), block(3)]}, r"blocks must have a cost each, or none"),
    ({"blocks": [block(0, 1, cost=0.5), block(2, cost="0.5"), block(3, cost=0)]}, r"\.blocks\[1\]\.cost: .*'0.5'"),
    ({"text_start": [0, "1"]}, r"\.text_start\[1\]: .*'1'"),
    ({"text_start": [-1]}, r"\.text_start\[0\]: .*-1"),
    ({"text_start": [True]}, r"\.text_start\[0\]: .*True"),
    ({"text_start": None}, r"\.text_start: .*None"),
    ({"finished": False}, r"'middle' is not finished. Run build_chain again"),
    ({"files": {"config.json": "0" * 64}}, r"anchors\[1\]: files must list config.json and model.safetensors"),
    ({"files": {"config.json": 0, "model.safetensors": "0" * 64}}, r"\.files\.'config.json': .*got 0"),
    ({"files": {"config.json": "0" * 64, "../x": "0" * 64}}, r"\.files\..*may lie outside, got '../x'"),
    ({"name": "../large"}, r"anchors\[1\]\.name: .*got '../large'"),
    ({"name": "/etc"}, r"anchors\[1\]\.name: .*got '/etc'"),
    ({"name": ".."}, r"anchors\[1\]\.name: .*got '..'"),
    ({"name": "a\\b"}, r"anchors\[1\]\.name: .*got 'a.*b'"),
    ({"name": ""}, r"anchors\[1\]\.name: .*got ''"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MANIFEST_EDITS)
def test_edited_manifest(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        Chain.from_pretrained(folder)
    assert "chain.json" in str(error.value)


@pytest.mark.parametrize(("values", "message"), ANCHOR_EDITS)
def test_edited_anchor(folder, values, message):
    edit(folder, lambda body: body["anchors"][1].update(values))
    with pytest.raises(ValueError, match=message) as error:
        Chain.from_pretrained(folder)
    assert "chain.json" in str(error.value)


@pytest.mark.parametrize("field", sorted(AnchorRecord.model_fields))
def test_no_field_may_be_left_out(folder, field):
    edit(folder, lambda body: body["anchors"][1].pop(field))
    with pytest.raises(ValueError, match=rf"anchors\[1\]\.{field}: the field is missing"):
        Chain.from_pretrained(folder)


@pytest.mark.parametrize("record", [True, 1, "x", [[1]], {"values": 1}])
def test_the_arguments_of_a_training_are_an_object(folder, record):
    edit(folder, lambda body: body["anchors"][1]["training"].update(arguments=record))
    with pytest.raises(ValueError, match=r"training\.arguments.* must be an object, got"):
        Chain.from_pretrained(folder)


def test_any_other_edit_breaks_the_checksum(folder):
    edit(folder, lambda body: body["anchors"][1].update(tokens_seen=10**9), seal=False)
    with pytest.raises(ValueError, match=r"chain\.json was edited or damaged"):
        Chain.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", STATISTICS_FILE])
def test_damaged_files(folder, name):
    file = folder / "middle" / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"middle.{name} is damaged or was changed: its sha256"):
        Chain.from_pretrained(folder)
    file.unlink()
    with pytest.raises(ValueError, match=rf"middle.{name} is missing, but .*chain.json lists it"):
        Chain.from_pretrained(folder, verify=False)


def test_without_verify_hashes_are_not_compared(folder):
    (folder / "middle" / STATISTICS_FILE).write_bytes(b"")
    assert len(Chain.from_pretrained(folder, verify=False).anchors) == 3


@pytest.mark.parametrize(
    "text", ["{", '{"model_type": "nothing-known"}', '{"model_type": "llama", "hidden_size": "wide"}']
)
def test_unreadable_config_without_verify(folder, text):
    (folder / "small" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"small.config.json cannot be read"):
        Chain.from_pretrained(folder, verify=False)


def test_missing_tensor_names_the_file(folder):
    file = folder / "small" / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.norm.weight")
    save_file(weights, file, metadata={"format": "pt"})
    anchor = Chain.from_pretrained(folder, verify=False)["small"]
    with pytest.raises(ValueError, match=r"small.model.safetensors lacks \['model.norm.weight'\]"):
        anchor.load_model()


def test_missing_statistics_and_tokenizer(tmp_path):
    write_anchor(tmp_path, {"name": "a"}, lambda folder: tiny_model("llama").save_pretrained(folder))
    chain = Chain.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a.statistics.safetensors was not stored with the anchor"):
        _ = chain.source.statistics_file
    with pytest.raises(ValueError, match=r"holds no tokenizer_config.json: .*processing_class=tokenizer"):
        chain.tokenizer()


@pytest.mark.parametrize("what", ["middle", "middle/model.safetensors"])
def test_links_out_of_the_folder_are_refused(folder, tmp_path, what):
    outside = tmp_path / "outside"
    shutil.move(folder / what, outside)
    os.symlink(outside, folder / what)
    with pytest.raises(ValueError, match=r"middle.* is a link that leaves"):
        Chain.from_pretrained(folder)


def test_stray_files_are_never_loaded(folder):
    (folder / "large" / "modeling_x.py").write_text("raise SystemExit")
    (folder / "large" / "pytorch_model.bin").write_bytes(b"not a model")
    assert Chain.from_pretrained(folder).source.load_model().num_parameters() > 0


def test_generation_config_is_kept(tmp_path):
    model = tiny_model("gpt2")
    assert isinstance(model, GPT2LMHeadModel)
    model.generation_config.repetition_penalty = 1.5
    write_anchor(tmp_path, {"name": "a"}, filler(model))
    assert Chain.from_pretrained(tmp_path).source.load_model().generation_config.repetition_penalty == 1.5
