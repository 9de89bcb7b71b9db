"""A chain on the Hub, fetched by the real client from a server on this machine: only what is used, at one commit."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_trl import Chain, from_chain
from cbd_trl.chain.chain import STATISTICS_FILE
from cbd_trl.cli.main import main
from tests.chain.helpers import DEEP, WIDE, same_weights
from tests.tokenizer import tiny_tokenizer


@pytest.fixture(autouse=True)
def there(hub, chain_folder):
    """The tiny chain is "me/chain", with two branches."""
    hub.commit("me/chain", chain_folder, "main", "v1")


def files_of(anchor, *names):
    return {f"{anchor.name}/{name}" for name in names}


def test_opening_fetches_chain_json_alone(hub, chain):
    opened = Chain.from_pretrained("me/chain")
    assert hub.fetched() == ["chain.json"]
    assert [anchor.name for anchor in opened.anchors] == [anchor.name for anchor in chain.anchors]
    assert opened.name_or_path == "me/chain"
    assert opened.revision == hub.head("me/chain") and chain.revision is None


def test_a_target_fetches_the_files_of_its_two_anchors(hub, chain):
    large, middle, small = chain.anchors
    model = from_chain("me/chain", config=WIDE)
    assert same_weights(dict(model.state_dict()), dict(from_chain(chain, config=WIDE).state_dict()))
    fetched = hub.fetched()
    assert len(fetched) == len(set(fetched))
    assert set(fetched) == {"chain.json"} | files_of(
        middle, *middle.small_files, "model.safetensors", STATISTICS_FILE
    ) | files_of(small, "config.json", "model.safetensors")
    assert not any(name.startswith(large.name) for name in fetched)
    # What it is called leads trainers to a tokenizer, on this machine.
    assert AutoTokenizer.from_pretrained(model.config.name_or_path).get_vocab() == tiny_tokenizer().get_vocab()


def test_a_depth_target_needs_no_statistics_and_an_anchor_nothing_but_itself(hub, chain):
    large, middle, _ = chain.anchors
    from_chain("me/chain", config=DEEP)
    assert not any(STATISTICS_FILE in name for name in hub.fetched())
    before = len(hub.fetched())
    from_chain("me/chain", large.num_parameters)
    # From the cache: opening asks the Hub which commit is meant, and nothing is sent again.
    assert len(hub.fetched()) == before
    assert {name.split("/")[0] for name in hub.fetched()} == {"chain.json", large.name, middle.name}


def test_everything_comes_from_the_commit_of_chain_json(hub, chain, chain_folder, tmp_path):
    first = hub.head("me/chain")
    opened = Chain.from_pretrained("me/chain", revision="v1")
    moved = tmp_path / "moved"
    shutil.copytree(chain_folder, moved)
    for file in moved.rglob("model.safetensors"):
        file.write_bytes(b"another chain")
    hub.commit("me/chain", moved, "main", "v1")
    model = from_chain(opened, config=WIDE)
    assert same_weights(dict(model.state_dict()), dict(from_chain(chain, config=WIDE).state_dict()))
    assert hub.revisions() == {"v1", first}
    assert model.config.cbd_trl["revision"] == opened.revision == first
    assert from_chain("me/chain", config=DEEP, revision=first).config.cbd_trl["revision"] == first
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or was changed"):
        from_chain("me/chain", config=WIDE, revision="v1")


def test_what_was_fetched_once_works_offline(hub, chain, tmp_path, monkeypatch):
    from_chain("me/chain", config=WIDE, save_directory=tmp_path / "first")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    for revision in (None, hub.head("me/chain")):
        model = from_chain("me/chain", config=WIDE, revision=revision, save_directory=tmp_path / "second")
        assert same_weights(
            dict(model.state_dict()), dict(AutoModelForCausalLM.from_pretrained(tmp_path / "first").state_dict())
        )
    missing = (
        rf"'me/chain' at commit [0-9a-f]{{40}}: {chain.source.name}/config.json could not be fetched .* is not in"
    )
    with pytest.raises(ValueError, match=rf"{missing}.*once with a connection \(and without HF_HUB_OFFLINE\)"):
        from_chain("me/chain", config=DEEP)
    with pytest.raises(ValueError, match=r"'me/other' is not a folder here, and its chain.json could not be fetched"):
        from_chain("me/other", config=DEEP)
    assert len(hub.requests) == asked


def test_an_unreachable_hub_is_like_offline(hub, monkeypatch):
    from_chain("me/chain", config=WIDE)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    assert from_chain("me/chain", config=WIDE).config.hidden_size == 24


@pytest.mark.parametrize(
    ("place", "revision", "message"),
    [
        (
            "me/nothing",
            None,
            r"'me/nothing' is not a folder here, and its chain.json could not .*There is no such repository, or it is "
            r"private .*RepositoryNotFoundError",
        ),
        ("me/chain", "v9", r"'me/chain' \(revision 'v9'\) .*no such branch, tag or commit: .*RevisionNotFoundError"),
        (
            "me/model",
            None,
            r"'me/model' .*chain.json could not be .*it is not a chain, or its upload was cut .*EntryNotFoundError",
        ),
    ],
)
def test_what_the_hub_does_not_have(hub, chain, place, revision, message):
    hub.commit("me/model", chain.source.path, "main")
    with pytest.raises(ValueError, match=message):
        Chain.from_pretrained(place, revision=revision)


def test_damage_is_found_when_the_file_is_first_used(hub, chain, chain_folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(chain_folder, broken)
    file = broken / chain.anchors[2].name / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    (broken / chain.anchors[0].name / "config.json").unlink()
    hub.commit("me/broken", broken, "main")
    opened = Chain.from_pretrained("me/broken")
    assert opened.anchors[1].load_model().num_parameters() == opened.anchors[1].num_parameters
    with pytest.raises(ValueError, match=rf"{opened.anchors[2].name}.model.safetensors is damaged or was changed"):
        opened.anchors[2].load_model()
    with pytest.raises(ValueError, match=r"config.json is missing, but .*chain.json lists it"):
        opened.anchors[0].config()
    assert Chain.from_pretrained("me/broken", verify=False).anchors[2].load_state_dict()


def test_sizes_tokenizer_and_a_copy_of_the_whole(hub, chain, tmp_path):
    opened = Chain.from_pretrained("me/chain")
    assert opened.sizes() == chain.sizes()
    assert {name.split("/")[-1] for name in hub.fetched()} == {"chain.json", "config.json"}
    assert opened.tokenizer().get_vocab() == tiny_tokenizer().get_vocab()
    assert not any(name.endswith("safetensors") for name in hub.fetched())
    opened.save_pretrained(tmp_path / "copy")
    copy = Chain.from_pretrained(tmp_path / "copy")
    assert copy.checksum == opened.checksum == chain.checksum
    assert [anchor.files for anchor in copy.anchors] == [anchor.files for anchor in chain.anchors]


def test_the_command_takes_a_hub_id_and_a_revision(hub, chain, tmp_path):
    flags = ["me/chain", "--shape", json.dumps(WIDE), "--revision", "v1", "--output", str(tmp_path / "model")]
    assert main(["init", *flags]) == 0
    told = AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.cbd_trl
    assert (told["chain"], told["revision"]) == ("me/chain", hub.head("me/chain", "v1"))
    assert not any(name.startswith(chain.source.name) for name in hub.fetched())


def test_the_hub_is_found_by_its_own_environment_variables(hub, chain, tmp_path):
    environment = {
        **os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "other-cache"), "HF_HUB_OFFLINE": "0"
    }  # fmt: skip
    code = "from cbd_trl import Chain; print(len(Chain.from_pretrained('me/chain').source.load_state_dict()))"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert int(run.stdout) == len(chain.source.load_state_dict())
    assert (tmp_path / "other-cache" / "models--me--chain").is_dir()
