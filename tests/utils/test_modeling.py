"""The one loader: what a checkpoint lacks is refused by name, what transformers ignores by design is not."""

import ast
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import cbd_trl
from cbd_trl.utils.modeling import check_checkpoint, check_no_adapter, check_plain, load_causal_lm
from tests.tiny import FAMILIES, MIXTURES, tiny_model

IDS = torch.arange(3, 15)[None]
DOWN = "model.layers.3.mlp.down_proj.weight"


def rewritten(model, folder, change):
    """The model saved with other keys than `save_pretrained` gives."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    state = change(load_file(file))
    save_file({key: tensor.clone() for key, tensor in state.items()}, file, metadata={"format": "pt"})
    return folder


def without(*keys):
    return lambda state: {key: tensor for key, tensor in state.items() if key not in keys}


def prefixed(prefix):
    return lambda state: {prefix + key: tensor for key, tensor in state.items()}


def added(**tensors):
    return lambda state: {**state, **{key.replace("__", "."): tensor for key, tensor in tensors.items()}}


def half_an_adapter(state):
    return {key.replace("q_proj.weight", "q_proj.base_layer.weight"): tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    ("change", "found", "way_out"),
    [
        (without("lm_head.weight"), r"1 weights are missing: lm_head\.weight", "a model without a head"),
        (without(DOWN), rf"1 weights are missing: {re.escape(DOWN)}", "A part was lost"),
        (without("model.norm.weight", DOWN), r"2 weights are missing: .*down_proj\.weight, model\.norm", "was lost"),
        (prefixed("_orig_mod."), r"39 weights are missing: .* and 34 more; 39 weights are not known", "torch.compile"),
        (prefixed("module."), r"not known to it: module\.lm_head", r"model\.module\.save_pretrained"),
        (prefixed("base_model.model."), "base_model.model.lm_head", r"merge_and_unload"),
        (prefixed("student.inner."), "student.inner.lm_head", r"The keys carry `student\.inner\.`"),
        (half_an_adapter, "q_proj.base_layer.weight", "merge_and_unload"),
        (added(v_head__summary__weight=torch.ones(3)), r"1 weights are not known to it: v_head", "value head"),
        (added(model__layers__4__mlp__down_proj__weight=torch.ones(32, 48)), "layers.4.mlp", "fewer layers"),
        (
            added(model__layers__0__mlp__up_proj__weight=torch.ones(40, 32)),
            r"1 weights have another shape: model.layers.0.mlp.up_proj.weight \(\[40, 32\], not \[48, 32\]\)",
            "config.json is another model's",
        ),
    ],
)
def test_weights_that_are_not_the_models_are_refused_by_name(tmp_path, change, found, way_out) -> None:
    folder = rewritten(tiny_model("llama"), tmp_path / "broken", change)
    with pytest.raises(ValueError, match=r"The source 'broken' is not a whole LlamaForCausalLM") as error:
        load_causal_lm(folder, role="source")
    assert re.search(found, str(error.value)) and re.search(way_out, str(error.value))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_checkpoints_load_under_new_and_old_keys(tmp_path, family, tied) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    with torch.no_grad():
        wanted = model(IDS).logits
    base = f"{model.base_model_prefix}."
    attention = next(
        name for name, _ in model.named_modules() if re.search(r"\.\d\.(self_attn|attn|attention)$", name)
    )

    def old(state):
        # Without the name of the base model, as GPT-2 is on the Hub, and with the buffers of older releases.
        named = {key.removeprefix(base): tensor for key, tensor in state.items()}
        buffers = {f"{attention}.rotary_emb.inv_freq": torch.ones(4)}
        if family in ("gpt2", "gpt_neox"):
            buffers |= {f"{attention}.bias": torch.ones(1, 1, 8, 8), f"{attention}.masked_bias": torch.tensor(-1e4)}
        return {**named, **{key.removeprefix(base): tensor for key, tensor in buffers.items()}}

    def head_too(state):
        head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
        return {**state, f"{head}.weight": model.get_output_embeddings().weight.detach()}

    for number, change in enumerate((dict, old, head_too)):
        loaded = load_causal_lm(rewritten(model, tmp_path / str(number), change), role="source")
        assert type(loaded) is type(model) and not loaded.training
        if family in MIXTURES:
            loaded.set_experts_implementation("eager")
        with torch.no_grad():
            assert torch.equal(loaded(IDS).logits, wanted)


def lose_a_shard(folder) -> None:
    shutil.rmtree(folder)
    tiny_model("llama").save_pretrained(folder, max_shard_size="60KB")
    os.remove(folder / "model-00002-of-00003.safetensors")


def index_cut_off(folder) -> None:
    shutil.rmtree(folder)
    tiny_model("llama").save_pretrained(folder, max_shard_size="60KB")
    file = folder / "model.safetensors.index.json"
    file.write_text(file.read_text()[:-20])


def cut_off(folder) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])


def only_pickles(folder) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    os.remove(folder / "model.safetensors")


def only_gguf(folder) -> None:
    os.rename(folder / "model.safetensors", folder / "model-q8_0.gguf")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lose_a_shard, "lost a weight file that its index names: model-00002-of-00003.safetensors"),
        (index_cut_off, r"index .*JSON \("),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json .*JSON"),
        (cut_off, "a weight file that is damaged or cut off"),
        (only_pickles, r"no model.safetensors but pytorch_model.bin.*use_safetensors=False\).save_pretrained"),
        (only_gguf, r"no model.safetensors but model-q8_0.gguf.*gguf_file="),
        (lambda folder: os.remove(folder / "model.safetensors"), "has no model.safetensors"),
    ],
)
def test_files_that_are_lost_cut_off_or_pickles_are_refused(tmp_path, damage, said, monkeypatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    damage(tmp_path / "model")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    with pytest.raises(ValueError, match=f"The anchor 'model' has {said.removeprefix('has ')}|The anchor.*{said}"):
        load_causal_lm(tmp_path / "model", role="anchor", use_safetensors=False)


@pytest.fixture
def adapter(tmp_path):
    """A LoRA that changes something, and its base."""
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    peft.save_pretrained(tmp_path / "adapter")
    return peft, tmp_path / "adapter"


def test_an_adapter_is_refused_or_put_on_a_whole_base(adapter) -> None:
    model, folder = adapter
    for refused in (
        lambda: load_causal_lm(folder, role="source"),
        lambda: check_no_adapter(folder, "source"),
        lambda: check_plain(model, "source"),
        lambda: check_plain(model.get_base_model(), "source"),
    ):
        with pytest.raises(ValueError, match=r"The source .*PEFT adapter.*merge_and_unload\(\)"):
            refused()
    with torch.no_grad():
        wanted = model.eval()(IDS).logits
        assert torch.equal(load_causal_lm(folder, role="teacher", adapters=True)(IDS).logits, wanted)
        check_plain(model.merge_and_unload(), "source")
    rewritten(tiny_model("llama"), folder.parent / "base", without(DOWN))
    with pytest.raises(ValueError, match=r"The teacher's base 'base' is not a whole.*down_proj"):
        load_causal_lm(folder, role="teacher", adapters=True)


@pytest.mark.parametrize("loss", ["weights", "a matrix"])
def test_an_adapter_that_is_not_whole_is_refused(adapter, loss) -> None:
    _, folder = adapter
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    if loss == "weights":
        torch.save(state, folder / "adapter_model.bin")
        os.remove(file)
        said = "adapter without adapter_model.safetensors"
    else:
        save_file({key: tensor for key, tensor in state.items() if "layers.2.self_attn.v_proj" not in key}, file)
        said = r"2 weights are missing: .*layers\.2\.self_attn\.v_proj"
    with pytest.raises(ValueError, match=said):
        load_causal_lm(folder, role="teacher", adapters=True)


def test_what_is_no_model_of_transformers_is_refused() -> None:
    with pytest.raises(TypeError, match=r"The source is a DataParallel.*`model\.module`"):
        check_plain(torch.nn.DataParallel(tiny_model("llama")), "source")
    with pytest.raises(TypeError, match="The source is a int"):
        check_plain(3, "source")


def test_a_folder_of_models_names_those_in_it(tmp_path) -> None:
    for name in ("source", "anchor-1"):
        tiny_model("llama").save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=r"config\.json.*anchor-1, source.*anchor-1"):
        load_causal_lm(tmp_path, role="teacher")


def test_weights_are_loaded_nowhere_else() -> None:
    """Every other call of `from_pretrained` of a model class would be a door without a lock."""
    package = Path(cbd_trl.__file__).parent
    found = [
        f"{file.relative_to(package)}:{node.lineno}"
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr == "from_pretrained"
        and not re.fullmatch(r"Auto(Config|Tokenizer)|GenerationConfig|Chain|cls", ast.unparse(node.value))
    ]
    assert [place.split(":")[0] for place in found] == ["utils/modeling.py"], found


def test_a_config_of_another_depth_is_refused(tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"9 weights are not known to it: model\.layers\.3\."):
        load_causal_lm(tmp_path, role="student")


def test_a_tied_head_of_another_size_is_refused_by_name(tmp_path) -> None:
    twice = added(lm_head__weight=torch.ones(128, 32))
    folder = rewritten(tiny_model("llama", tie_word_embeddings=True), tmp_path / "resized", twice)
    for look in (load_causal_lm, check_checkpoint):
        with pytest.raises(ValueError, match=r"another shape: lm_head\.weight \(\[128, 32\], not \[64, 32\]\)"):
            look(folder, role="source")


@pytest.mark.parametrize("bits", [{"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, {"load_in_8bit": True}])
def test_a_quantized_checkpoint_is_held_to_the_same(tmp_path, bits) -> None:
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64, "num_attention_heads": 2}
    model = tiny_model("llama", num_key_value_heads=2, **wide)
    model.save_pretrained(tmp_path / "plain")
    options = {"role": "teacher", "quantization_config": BitsAndBytesConfig(**bits)}
    packed = load_causal_lm(tmp_path / "plain", **options)
    packed.save_pretrained(tmp_path / "packed")
    check_checkpoint(tmp_path / "packed", role="teacher")
    with torch.no_grad():
        loaded = load_causal_lm(tmp_path / "packed", role="teacher")
        assert torch.allclose(loaded(IDS).logits, packed(IDS).logits, atol=1e-2 * packed(IDS).logits.std().item())
    for lost in (DOWN, "lm_head.weight"):
        folder = rewritten(packed, tmp_path / lost, lambda state, lost=lost: without(*matching(state, lost))(state))
        with pytest.raises(ValueError, match=rf"1 weights are missing: {re.escape(lost)}"):
            load_causal_lm(folder, role="teacher")


def matching(state, key):
    """A weight and what its format stores beside it."""
    return [one for one in state if one.startswith(key.removesuffix("weight"))]
