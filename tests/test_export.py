"""What docs/guides/export.md says: a target is a stock model to the tools that read folders of models."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import MODEL_ARCH, MODEL_TENSOR, MODEL_TENSORS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from cbd_trl import Chain, from_chain
from cbd_trl.architectures import describe
from tests.chain.helpers import DEEP, WIDE, build_tiny_chain
from tests.gguf_files import write_gguf
from tests.tiny import MIXTURES, ROWS, tiny_model
from tests.tokenizer import tiny_tokenizer

# What llama.cpp calls them; it has no OPT.
ARCHITECTURES = {family: MODEL_ARCH[row.gguf] for family, row in ROWS.items() if row.gguf is not None}


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Chain:
    return build_tiny_chain(tmp_path_factory.mktemp("export") / "chain")


def assert_same_through_gguf(model: Any, folder: Path) -> None:
    """A model that was saved in a folder has the same logits when it is read back from a GGUF file."""
    write_gguf(folder, folder / "model.gguf")
    back: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    tokens = torch.arange(6, 26)[None]
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        torch.testing.assert_close(back(input_ids=tokens).logits, expected, rtol=0, atol=1e-5 * expected.std().item())


@pytest.mark.parametrize("shape", [DEEP, WIDE], ids=["depth", "width"])
def test_a_target_goes_through_gguf_and_back(chain, tmp_path, shape):
    assert_same_through_gguf(from_chain(chain, config=shape, save_directory=tmp_path), tmp_path)


# What GGUF has no field for is as transformers has it by default.
IN_GGUF: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "gemma3_text": {
        "tie_word_embeddings": True,
        "num_hidden_layers": 6,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
        "final_logit_softcapping": None,
        "rope_parameters": None,
    },
}


@pytest.mark.parametrize("family", IN_GGUF)
def test_other_families_go_through_gguf_and_back(tmp_path, family):
    model = tiny_model(family, **IN_GGUF[family])
    model.save_pretrained(tmp_path)
    assert_same_through_gguf(model, tmp_path)


def test_a_saved_target_is_a_folder_like_any_other(chain, tmp_path):
    model = from_chain(chain, config=WIDE, save_directory=tmp_path / "target")
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert type(model) is LlamaForCausalLM and config["architectures"] == ["LlamaForCausalLM"]
    assert not {"auto_map", "custom_pipelines"} & config.keys()
    # Files, tensors and fields of one that transformers made from the same config; one field more, and a card.
    del model.config.cbd_trl
    LlamaForCausalLM(model.config).save_pretrained(tmp_path / "stock")
    tiny_tokenizer().save_pretrained(tmp_path / "stock")
    stock = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config.keys() - stock.keys() == {"cbd_trl"} and stock.keys() <= config.keys()
    names = {path.name for path in (tmp_path / "stock").iterdir()}
    assert names | {"README.md"} == {path.name for path in (tmp_path / "target").iterdir()}
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("target", "stock"))
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: one.shape for key, one in theirs.items()}
    assert AutoTokenizer.from_pretrained(tmp_path / "target").chat_template == tiny_tokenizer().chat_template


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_gguf_has_a_name_for_every_tensor(family):
    names = gguf.get_tensor_name_map(ARCHITECTURES[family], 4)
    # Of some families llama.cpp has tied heads alone.
    tied = {} if MODEL_TENSOR.OUTPUT in MODEL_TENSORS[ARCHITECTURES[family]] else {"tie_word_embeddings": True}
    model = tiny_model(family, **tied)
    # llama.cpp has gate and up of experts apart, as surgery has them, and knows them by these names.
    mixture = family in MIXTURES
    keys = describe(model.config).stored if mixture else dict(model.named_parameters())
    unnamed = [key for key in keys if names.get_name(key, (".weight", ".bias")) is None]
    # Numbers of an activation (Apertus) are metadata of the file; the converter renames a bias (Qwen3.5).
    assert [key for key in unnamed if ".act_fn." not in key and not key.endswith(".dt_bias")] == []
