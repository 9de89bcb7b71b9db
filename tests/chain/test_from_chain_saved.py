"""What from_chain writes is a normal model folder, written whole or not at all."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedModel

from cbd_trl import from_chain
from tests.chain.helpers import DEEP, WIDE
from tests.surgery.helpers import logits
from tests.tokenizer import tiny_tokenizer


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
    told = json.loads((folder / "config.json").read_text())["cbd_trl"]
    assert told == model.config.cbd_trl == loaded.config.cbd_trl
    assert told["operator"] == "nested" and told["chain"] == chain.name_or_path
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_an_anchor_is_saved_with_everything_too(chain, tmp_path):
    anchor = chain.anchors[2]
    model = from_chain(chain, anchor.num_parameters, save_directory=tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    assert GenerationConfig.from_pretrained(tmp_path / "model").temperature == 0.7
    assert AutoTokenizer.from_pretrained(model.name_or_path).chat_template == tiny_tokenizer().chat_template


def test_without_a_directory_the_name_leads_to_the_tokenizer(chain):
    model = from_chain(chain, config=WIDE)
    assert model.name_or_path == model.config._name_or_path == str(chain.anchors[1].path)
    assert AutoTokenizer.from_pretrained(model.name_or_path).get_vocab() == tiny_tokenizer().get_vocab()
    assert model.generation_config.temperature == 0.7


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
        with pytest.raises(ValueError, match=r"holds something other than a model that from_chain saved. Choose an"):
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
