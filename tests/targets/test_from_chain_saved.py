"""What from_chain writes is a normal model folder, written whole or not at all."""

import json
import re
import shutil

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from trl import GRPOConfig, GRPOTrainer

from cbd_trl import from_chain
from tests.chain.helpers import DEEP, WIDE
from tests.surgery.helpers import logits
from tests.tokenizer import tiny_tokenizer
from tests.training import make_trainer


def test_a_saved_model_is_a_normal_model(chain, tmp_path):
    folder = tmp_path / "made" / "model"
    model = from_chain(chain, config=WIDE, save_directory=folder, dtype="bfloat16")
    assert model.name_or_path == model.config._name_or_path == str(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is LlamaForCausalLM and loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.temperature, generation.do_sample) == (0.7, True)
    provenance = json.loads((folder / "config.json").read_text())["cbd_trl"]
    assert provenance == model.config.cbd_trl == loaded.config.cbd_trl
    assert provenance["operator"] == "nested" and provenance["chain"] == chain.path.name
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_an_anchor_is_saved_with_everything_too(chain, tmp_path):
    anchor = chain.anchors[2]
    model = from_chain(chain, anchor.num_parameters, save_directory=tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    assert GenerationConfig.from_pretrained(tmp_path / "model").temperature == 0.7
    assert AutoTokenizer.from_pretrained(model.name_or_path).chat_template == tiny_tokenizer().chat_template


def test_without_a_directory_the_name_leads_to_the_tokenizer_and_to_no_weights(chain):
    model = from_chain(chain, config=WIDE)
    name = model.config.name_or_path
    assert AutoTokenizer.from_pretrained(name).get_vocab() == tiny_tokenizer().get_vocab()
    assert AutoTokenizer.from_pretrained(name).chat_template == tiny_tokenizer().chat_template
    assert AutoConfig.from_pretrained(name).hidden_size == WIDE["hidden_size"]
    with pytest.raises(OSError, match=r"no file named model.safetensors.*not-saved"):
        AutoModelForCausalLM.from_pretrained(name)
    assert model.generation_config.temperature == 0.7


@pytest.mark.filterwarnings("ignore:Could not find a config file in 41K from chain, made in memory:UserWarning")
def test_an_adapter_names_the_base_that_it_was_trained_on_or_none(chain, tmp_path):
    """It says which model it was where that was never saved, and loads nothing else in its place."""
    ids = torch.arange(6, 18)[None]
    for place in (None, tmp_path / "base"):
        base = from_chain(chain, config=DEEP, save_directory=place)
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        adapted.save_pretrained(tmp_path / "adapter")
        named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        if place is None:
            assert re.fullmatch(r"41K from chain, made in memory.*give cbd_trl.from_chain a save_directory", named)
            with pytest.raises(OSError, match=r"41K from chain, made in memory"):
                AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        else:
            assert named == str(place)
            loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
            assert torch.equal(loaded(ids).logits, adapted.eval()(ids).logits)


@pytest.mark.parametrize("saved", [True, False])
def test_trainers_find_the_tokenizer_of_a_target_and_no_other_reference(chain, tmp_path, saved):
    """GRPO's reference is the model by the config's name: itself where it was saved, and an error where not."""
    model = from_chain(chain, config=DEEP, save_directory=tmp_path / "base" if saved else None)
    options = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "report_to": "none"}
    own = make_trainer(student=model, processing_class=None)
    assert own.processing_class.get_vocab() == tiny_tokenizer().get_vocab()
    prompts = Dataset.from_dict({"prompt": ["w1 w2"] * 8})

    def reinforce() -> GRPOTrainer:
        return GRPOTrainer(model, lambda completions, **_: [0.0], GRPOConfig(beta=0.1, **options), prompts)

    if not saved:
        with pytest.raises(OSError, match="not-saved"):
            reinforce()
        return
    reference = reinforce().ref_model
    assert torch.equal(logits(reference), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")))


def test_a_failed_save_leaves_the_old_model(chain, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    from_chain(chain, config=DEEP, save_directory=folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(self, *args, **kwargs):
        raise OSError("disk full")

    for owner, name in ((PreTrainedModel, "save_pretrained"), (type(chain.tokenizer()), "save_pretrained")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(OSError, match="disk full"):
                from_chain(chain, config=WIDE, save_directory=folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
    from_chain(chain, config=WIDE, save_directory=folder)
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 24


def test_nothing_but_its_own_models_is_overwritten(chain, tmp_path):
    def refused(folder):
        with pytest.raises(ValueError, match="save_directory="):
            from_chain(chain, config=WIDE, save_directory=folder)

    (tmp_path / "notes.txt").write_text("mine")
    refused(tmp_path)
    refused(tmp_path / "notes.txt")
    shutil.copytree(chain.anchors[0].path, tmp_path / "anchor")
    refused(tmp_path / "anchor")
    from_chain(chain, config=WIDE, save_directory=tmp_path / "tuned")
    (tmp_path / "tuned" / "checkpoint-1").mkdir()
    refused(tmp_path / "tuned")
    (tmp_path / "empty").mkdir()
    from_chain(chain, config=WIDE, save_directory=tmp_path / "empty")
