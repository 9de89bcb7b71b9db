"""A chain pushed by the real client to a Hub on this machine, and pulled from there."""

import hashlib

import pytest
from huggingface_hub import constants

from cbd_trl import Chain, from_chain
from cbd_trl.chain.manifest import STATISTICS_FILE
from tests.chain.helpers import WIDE, same_weights

# How the Hub's client sends a file is on its way out in its HTTP library; neither is ours.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


def weights_of_files(chain):
    return [
        path.read_bytes()
        for anchor in chain.anchors
        for path in (anchor.path / name for name in anchor.files if name.endswith(".safetensors"))
    ]


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_what_is_pushed_is_what_is_pulled(hub, chain):
    commit = chain.push_to_hub("me/pushed", commit_message="Version one")
    assert commit == f"{hub.address}/me/pushed/commit/{hub.head('me/pushed')}"
    assert hub.repositories["me/pushed"].messages[commit.oid] == "Version one"
    pulled = Chain.from_pretrained("me/pushed", revision=commit.oid)
    assert (pulled.checksum, pulled.revision) == (chain.checksum, commit.oid)
    assert [anchor.files for anchor in pulled.anchors] == [anchor.files for anchor in chain.anchors]
    for anchor, theirs in zip(chain.anchors, pulled.anchors, strict=True):
        assert same_weights(dict(anchor.load_state_dict()), dict(theirs.load_state_dict()))
        assert theirs.statistics_file.read_bytes() == anchor.statistics_file.read_bytes()
    assert pulled.tokenizer().get_vocab() == chain.tokenizer().get_vocab()
    model = from_chain("me/pushed", config=WIDE)
    assert same_weights(dict(model.state_dict()), dict(from_chain(chain, config=WIDE).state_dict()))
    assert STATISTICS_FILE in pulled.anchors[1].files


def test_everything_comes_in_one_commit_and_once(hub, chain):
    first = chain.push_to_hub("me/pushed")
    assert len(hub.repositories["me/pushed"].commits) == 2
    assert set(hub.files("me/pushed")) == {".gitattributes", "chain.json"} | {
        f"{anchor.name}/{name}" for anchor in chain.anchors for name in anchor.files
    }
    sent = list(hub.uploads)
    assert sorted(sent) == sorted({sha256(content) for content in weights_of_files(chain)})
    again = chain.push_to_hub("me/pushed")
    assert again.oid == first.oid and hub.uploads == sent


def test_an_interrupted_push_is_no_chain_and_goes_on_where_it_was(hub, chain):
    hub.uploads_until_cut = 3
    with pytest.raises(ConnectionError, match=r"upload to 'me/pushed' was cut off before its commit.*not sent again"):
        chain.push_to_hub("me/pushed")
    arrived = list(hub.uploads)
    assert len(arrived) == 3 and set(hub.files("me/pushed")) == {".gitattributes"}
    with pytest.raises(ValueError, match=r"'me/pushed' .* upload was cut off before the end. Push it again"):
        Chain.from_pretrained("me/pushed")
    hub.uploads_until_cut = None
    chain.push_to_hub("me/pushed")
    assert hub.uploads[:3] == arrived and not set(hub.uploads[3:]) & set(arrived)
    assert len(hub.uploads) == len(set(hub.uploads)) == len({sha256(part) for part in weights_of_files(chain)})
    assert Chain.from_pretrained("me/pushed").checksum == chain.checksum


def test_a_cut_update_leaves_the_old_chain_whole(hub, chain, chain_folder):
    old = hub.commit("me/pushed", chain.anchors[0].path, "main")
    hub.uploads_until_cut = 1
    with pytest.raises(ConnectionError, match="cut off before its commit"):
        chain.push_to_hub("me/pushed")
    assert hub.head("me/pushed") == old


def test_a_branch_of_its_own(hub, chain):
    hub.commit("me/pushed", chain.anchors[0].path, "main")
    before = hub.head("me/pushed")
    commit = chain.push_to_hub("me/pushed", revision="v2")
    assert hub.head("me/pushed") == before and hub.head("me/pushed", "v2") == commit.oid
    assert Chain.from_pretrained("me/pushed", revision="v2").revision == commit.oid


def test_private_needs_a_token(hub, chain):
    chain.push_to_hub("me/secret", private=True)
    assert hub.repositories["me/secret"].private
    for token, message in (
        (False, "RepositoryNotFoundError"),
        ("token-of-you", "it is private and may not be seen without a token that allows it.*RepositoryNotFoundError"),
        ("token-of-nobody", "The Hub does not accept the token: log in again"),
    ):
        with pytest.raises(ValueError, match=message):
            Chain.from_pretrained("me/secret", token=token)
    assert not hub.fetched()
    assert from_chain("me/secret", config=WIDE, token="token-of-me").config.cbd_trl["chain"] == "me/secret"


@pytest.mark.parametrize(
    ("repo_id", "token", "message"),
    [
        ("me/pushed", False, "'me/pushed'. The Hub does not accept the token: log in"),
        ("me/pushed", "token-of-nobody", "'me/pushed'. The Hub does not accept the token: log in"),
        ("me/pushed", "token-of-you", "'me/pushed'. The token may not do that: give one that may write there"),
        ("me/a chain", None, "'me/a chain'. This is no id of a repository: wanted 'owner/name'"),
    ],
)
def test_who_may_not_push_is_told(hub, chain, repo_id, token, message):
    with pytest.raises(ValueError, match=f"The chain cannot be pushed to {message}"):
        chain.push_to_hub(repo_id, token=token)
    assert not hub.repositories


def test_nothing_is_pushed_offline(hub, chain, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"cannot be pushed to 'me/pushed'. HF_HUB_OFFLINE is set: unset it"):
        chain.push_to_hub("me/pushed")
    assert not hub.requests
