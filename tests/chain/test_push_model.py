"""What from_chain makes goes to the Hub like any model, and so does its tokenizer."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_trl import from_chain
from tests.chain.helpers import DEEP, same_weights
from tests.tokenizer import tiny_tokenizer

# How the Hub's client sends a file is on its way out in its HTTP library; neither is ours.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


def test_a_target_and_its_tokenizer_are_pushed_like_any_model(hub, chain_folder):
    hub.commit("me/chain", chain_folder, "main", "v1")
    model = from_chain("me/chain", config=DEEP, revision="v1")
    model.push_to_hub("me/target", private=True)
    AutoTokenizer.from_pretrained(model.config.name_or_path).push_to_hub("me/target")
    files = set(hub.files("me/target"))
    assert hub.repositories["me/target"].private
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
    assert not any(name.endswith((".bin", ".pt", ".py")) for name in files)
    pulled = AutoModelForCausalLM.from_pretrained("me/target")
    assert same_weights(dict(pulled.state_dict()), dict(model.state_dict()))
    assert pulled.config.cbd_trl == model.config.cbd_trl
    assert pulled.config.cbd_trl["revision"] == hub.head("me/chain", "v1")
    assert AutoTokenizer.from_pretrained("me/target").get_vocab() == tiny_tokenizer().get_vocab()


def test_a_target_from_disk_goes_to_a_branch(hub, chain, tmp_path):
    model = from_chain(chain, config=DEEP, save_directory=tmp_path / "target")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    loaded.push_to_hub("me/target", revision="v2", commit_message="A target")
    assert hub.repositories["me/target"].messages[hub.head("me/target", "v2")] == "A target"
    pulled = AutoModelForCausalLM.from_pretrained("me/target", revision="v2")
    assert same_weights(dict(pulled.state_dict()), dict(model.state_dict()))
