"""Anchors in repositories of their own, at the commits that chain.json pins."""

import hashlib
import json
import re

import pytest
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from cbd_trl import Chain, from_chain
from cbd_trl.chain import manifest as chain_json
from cbd_trl.chain.manifest import read_manifest, write_manifest
from tests.chain.helpers import WIDE, same_weights

# How the Hub's client sends a file is on its way out in its HTTP library; neither is ours.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture
def pinned(hub, chain):
    """The tiny chain as "me/chain", its anchors beside it."""
    chain.push_to_hub("me/chain", own_repos=True)
    return hub


def own_repo(anchor):
    return f"me/chain-{anchor.name}"


def test_each_anchor_is_a_model_of_its_own(pinned, chain):
    assert set(pinned.files("me/chain")) == {".gitattributes", "chain.json", "README.md"}
    said = json.loads(pinned.files("me/chain")["chain.json"])
    assert [anchor["repo"] for anchor in said["anchors"]] == [
        {"repo_id": own_repo(anchor), "revision": pinned.head(own_repo(anchor))} for anchor in chain.anchors
    ]
    for anchor in chain.anchors:
        model = AutoModelForCausalLM.from_pretrained(own_repo(anchor))
        assert same_weights(dict(model.state_dict()), dict(anchor.load_model().state_dict()))
    card = pinned.files(own_repo(chain.source))["README.md"].decode()
    assert f'from_pretrained("{own_repo(chain.source)}")' in card


def test_a_target_fetches_from_the_repositories_of_its_two_anchors(pinned, chain):
    model = from_chain("me/chain", config=WIDE)
    assert same_weights(dict(model.state_dict()), dict(from_chain(chain, config=WIDE).state_dict()))
    asked = {"/".join(path.split("/")[1:3]) for _, path in pinned.requests if "/resolve/" in path}
    assert asked == {"me/chain", *map(own_repo, chain.anchors[1:])}
    asked_before = len(pinned.fetched())
    from_chain("me/chain", config=WIDE)
    assert len(pinned.fetched()) == asked_before


def test_the_pin_holds_when_the_anchor_moves_on(pinned, chain, tmp_path):
    moved = tmp_path / "moved"
    chain.anchors[0].load_model().save_pretrained(moved)
    pinned.commit(own_repo(chain.anchors[1]), moved, "main")
    opened = Chain.from_pretrained("me/chain")
    assert same_weights(dict(opened.anchors[1].load_state_dict()), dict(chain.anchors[1].load_state_dict()))


def test_a_copy_holds_all_and_can_be_pushed_together_again(pinned, chain, tmp_path):
    opened = Chain.from_pretrained("me/chain")
    opened.save_pretrained(tmp_path / "copy")
    copy = Chain.from_pretrained(tmp_path / "copy")
    assert copy.checksum == chain.checksum and all(anchor.repo is None for anchor in copy.anchors)
    opened.push_to_hub("me/together")
    assert Chain.from_pretrained("me/together").checksum == chain.checksum
    # From one to the other in the same repository nothing is left over, and nothing is sent twice.
    sent = list(pinned.uploads)
    copy.push_to_hub("me/together", own_repos=True)
    assert set(pinned.files("me/together")) == {".gitattributes", "chain.json", "README.md"}
    assert pinned.uploads == sent


def test_a_folder_may_hold_chain_json_alone(pinned, chain, tmp_path, monkeypatch):
    (tmp_path / "chain.json").write_bytes(pinned.files("me/chain")["chain.json"])
    model = from_chain(tmp_path, config=WIDE)
    assert same_weights(dict(model.state_dict()), dict(from_chain(chain, config=WIDE).state_dict()))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert from_chain(tmp_path, config=WIDE).config.hidden_size == 24
    missing = (
        rf"'{own_repo(chain.source)}' at commit {pinned.head(own_repo(chain.source))}: model.safetensors could not"
    )
    with pytest.raises(ValueError, match=missing):
        Chain.from_pretrained(tmp_path).source.load_state_dict()


def test_another_model_at_the_pinned_commit_is_refused(pinned, chain):
    anchor = chain.anchors[2]
    files = pinned.files(own_repo(anchor))
    files["model.safetensors"] = files["model.safetensors"][:-1] + b"\x7f"
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or was changed: its sha256 is not the one in"):
        Chain.from_pretrained("me/chain").anchors[2].load_state_dict()


def test_an_anchor_that_is_gone_or_hidden_is_named(pinned, chain):
    pinned.repositories[own_repo(chain.anchors[2])].private = True
    del pinned.repositories[own_repo(chain.anchors[1])]
    opened = Chain.from_pretrained("me/chain", token="token-of-you")
    for anchor in opened.anchors[1:]:
        repo = re.escape(own_repo(anchor))
        with pytest.raises(ValueError, match=rf"'{repo}' at commit .*There is no such repository, or it is private"):
            anchor.load_state_dict()


def test_an_interrupted_push_pins_nothing_and_goes_on(hub, chain):
    hub.uploads_until_cut = 3
    with pytest.raises(ConnectionError, match=rf"upload to '{own_repo(chain.anchors[1])}' was cut off"):
        chain.push_to_hub("me/chain", own_repos=True)
    first = hub.head(own_repo(chain.source))
    assert "chain.json" not in hub.files("me/chain")
    hub.uploads_until_cut = None
    chain.push_to_hub("me/chain", own_repos=True)
    assert len(hub.uploads) == len(set(hub.uploads)) and hub.head(own_repo(chain.source)) == first
    pin = Chain.from_pretrained("me/chain").source.repo
    assert (pin.repo_id, pin.revision) == (own_repo(chain.source), first)


def committed(hub, repo_id, folder, **files):
    """A repository with these files beside those that it has."""
    folder.mkdir(exist_ok=True)
    there = hub.files(repo_id) if repo_id in hub.repositories else {}
    for name, content in {**there, **files}.items():
        (folder / name).write_bytes(content)
    return hub.commit(repo_id, folder, "main")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.gguf", "chain.json"])
def test_a_model_that_is_no_anchor_is_not_overwritten(hub, chain, tmp_path, name):
    own = own_repo(chain.anchors[2])
    before = committed(hub, own, tmp_path / "theirs", **{name: b"theirs", "adapter_config.json": b"{}"})
    with pytest.raises(ValueError, match=rf"'{own}' holds a model that is not an anchor of .*Choose another id"):
        chain.push_to_hub("me/chain", own_repos=True)
    assert hub.head(own) == before and not hub.uploads
    assert set(hub.files("me/chain")) == set(hub.files(own_repo(chain.source))) == {".gitattributes"}


def test_a_chain_that_pins_others_does_not_make_it_one(pinned, chain, tmp_path):
    own = own_repo(chain.anchors[2])
    said = json.loads(pinned.files("me/chain")["chain.json"])
    pinned.repositories["me/chain"].references["main"] = next(iter(pinned.repositories["me/chain"].commits))
    # The same anchor, as an interrupted push leaves it, may be pushed again; with something beside it, it is not that.
    chain.push_to_hub("me/chain", own_repos=True)
    assert json.loads(pinned.files("me/chain")["chain.json"]) == said
    pinned.repositories["me/chain"].references["main"] = next(iter(pinned.repositories["me/chain"].commits))
    for files in ({"adapter_config.json": b"{}"}, {"config.json": b"{}"}):
        pinned.repositories[own].references["main"] = said["anchors"][2]["repo"]["revision"]
        before = committed(pinned, own, tmp_path / next(iter(files)), **files)
        with pytest.raises(ValueError, match=rf"'{own}' holds a model that is not an anchor of this chain"):
            chain.push_to_hub("me/chain", own_repos=True)
        assert pinned.head(own) == before


def test_what_an_earlier_anchor_left_is_taken_away_and_nothing_else(pinned, chain, tmp_path):
    own = own_repo(chain.source)
    files = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}"}
    files |= {"model.Q4_K_M.gguf": b"mine", "notes.txt": b"mine"}
    committed(pinned, own, tmp_path / "earlier", **files)
    chain.push_to_hub("me/chain", own_repos=True)
    there = pinned.files(own)
    assert set(there) == {".gitattributes", "README.md", *chain.source.files, "model.Q4_K_M.gguf", "notes.txt"}
    AutoModelForCausalLM.from_pretrained(own)


def test_files_that_only_the_earlier_anchor_had_are_taken_away(hub, chain, tmp_path):
    chain.save_pretrained(tmp_path / "more")
    said = read_manifest(tmp_path / "more")
    (tmp_path / "more" / said.anchors[0].name / "extra.json").write_text("{}")
    files = {**said.anchors[0].files, "extra.json": hashlib.sha256(b"{}").hexdigest()}
    anchors = [said.anchors[0].model_copy(update={"files": files}), *said.anchors[1:]]
    write_manifest(tmp_path / "more", said.model_copy(update={"anchors": anchors}))
    Chain.from_pretrained(tmp_path / "more").push_to_hub("me/chain", own_repos=True)
    assert "extra.json" in hub.files(own_repo(chain.source))
    chain.push_to_hub("me/chain", own_repos=True)
    assert "extra.json" not in hub.files(own_repo(chain.source))
    assert Chain.from_pretrained("me/chain").checksum != chain.checksum


def test_no_anchor_goes_to_a_public_repository_when_all_is_to_be_private(hub, chain):
    own = own_repo(chain.anchors[1])
    hub.create({"name": own.split("/")[1]}, "me")
    with pytest.raises(ValueError, match=rf"'{own}' is there and public, and private=True .* requires a private"):
        chain.push_to_hub("me/chain", own_repos=True, private=True)
    assert not hub.uploads and set(hub.files(own)) == {".gitattributes"}


COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    "repo",
    [
        {},
        {"repo_id": "me/anchor"},
        {"repo_id": "me/anchor", "revision": "main"},
        {"repo_id": "me/anchor", "revision": COMMIT[:7]},
        {"repo_id": "me/anchor", "revision": COMMIT.replace("0", "A")},
        {"repo_id": "me/anchor", "revision": f"{COMMIT}\n"},
        {"repo_id": "me/anchor", "revision": int(COMMIT)},
        {"repo_id": "anchor", "revision": COMMIT},
        {"repo_id": "../anchor", "revision": COMMIT},
        {"repo_id": "me/..", "revision": COMMIT},
        {"repo_id": "me/a--b", "revision": COMMIT},
        {"repo_id": "me/anchor/more", "revision": COMMIT},
        {"repo_id": "/me/anchor", "revision": COMMIT},
        {"repo_id": "me/anchor?x=1", "revision": COMMIT},
        {"repo_id": "https://there/me", "revision": COMMIT},
        {"repo_id": 3, "revision": COMMIT},
        {"repo_id": "me/anchor", "revision": COMMIT, "path": "elsewhere"},
    ],
)
def test_what_is_no_repository_at_one_commit_is_refused(chain, tmp_path, repo):
    with pytest.raises(ValueError, match=r"chain\.json, anchors\[1\]\.repo\."):
        read_manifest(with_repo(chain, tmp_path, repo))


def test_a_pin_is_an_object_and_a_good_one_is_read(chain, tmp_path):
    with pytest.raises(ValueError, match=r"anchors\[1\]\.repo: .*'me/anchor'"):
        read_manifest(with_repo(chain, tmp_path, "me/anchor"))
    repo = {"repo_id": "me/anchor_1.5B-x", "revision": COMMIT}
    assert read_manifest(with_repo(chain, tmp_path, repo)).anchors[1].repo.model_dump() == repo


def with_repo(chain, folder, repo):
    """A chain.json whose second anchor is said to lie there, with a checksum that fits."""
    body = json.loads((chain.path / "chain.json").read_text())
    del body["checksum"]
    body["anchors"][1]["repo"] = repo
    (folder / "chain.json").write_text(json.dumps({**body, "checksum": chain_json._checksum(body)}))
    return folder
