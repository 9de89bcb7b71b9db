"""A chain pushed by the real client to a Hub on this machine, and pulled from there."""

import hashlib
import os
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import constants

from cbd_trl import Chain, from_chain
from cbd_trl.chain.chain import STATISTICS_FILE
from cbd_trl.chain.manifest import read_manifest, write_manifest
from cbd_trl.cli.main import main
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
    assert set(hub.files("me/pushed")) == {".gitattributes", "chain.json", "README.md"} | {
        f"{anchor.name}/{name}" for anchor in chain.anchors for name in (*anchor.files, "README.md")
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


@pytest.fixture
def shorter(chain_folder, tmp_path):
    """The first two anchors of the tiny chain, as a chain of its own."""
    folder = tmp_path / "shorter"
    Chain.from_pretrained(chain_folder).save_pretrained(folder)
    manifest = read_manifest(folder)
    shutil.rmtree(folder / manifest.anchors[2].name)
    write_manifest(folder, manifest.model_copy(update={"anchors": manifest.anchors[:2]}))
    return Chain.from_pretrained(folder)


def test_a_push_cut_by_death_goes_on_in_the_next_process(hub, chain):
    """Not an error that somebody handles: the process is gone after three files."""
    hub.uploads_until_hold = 3
    code = f"from cbd_trl import Chain; Chain.from_pretrained({str(chain.path)!r}).push_to_hub('me/pushed')"
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL) as process:
        assert hub.holding.wait(120)
        process.kill()
    hub.uploads_until_hold = None
    arrived = list(hub.uploads)
    assert len(arrived) == 3 and set(hub.files("me/pushed")) == {".gitattributes"}
    chain.push_to_hub("me/pushed")
    assert len(hub.uploads) == len(set(hub.uploads)) and hub.uploads[:3] == arrived
    assert Chain.from_pretrained("me/pushed").checksum == chain.checksum


def test_one_broken_connection_is_not_noticed(hub, chain):
    hub.uploads_until_cut, hub.cuts = 2, 1
    chain.push_to_hub("me/pushed")
    assert hub.cuts == 0 and Chain.from_pretrained("me/pushed").checksum == chain.checksum


def test_a_cut_update_leaves_the_old_chain_whole(hub, chain, shorter):
    old = shorter.push_to_hub("me/pushed").oid
    hub.uploads_until_cut = 1
    with pytest.raises(ConnectionError, match="cut off before its commit"):
        chain.push_to_hub("me/pushed")
    assert hub.head("me/pushed") == old
    assert Chain.from_pretrained("me/pushed").checksum == shorter.checksum


def test_a_shorter_chain_takes_the_place_of_a_longer_one(hub, chain, shorter):
    long = chain.push_to_hub("me/pushed").oid
    shorter.push_to_hub("me/pushed")
    gone = chain.anchors[2].name
    assert not any(name.startswith(f"{gone}/") for name in hub.files("me/pushed"))
    assert Chain.from_pretrained("me/pushed").checksum == shorter.checksum
    assert Chain.from_pretrained("me/pushed", revision=long).checksum == chain.checksum


def test_a_model_is_not_overwritten(hub, chain):
    before = hub.commit("me/model", chain.source.path, "main")
    with pytest.raises(ValueError, match=r"'me/model' holds weights and no chain.json: it is not a chain"):
        chain.push_to_hub("me/model")
    assert hub.head("me/model") == before


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.Q4_K_M.gguf", "weights/model.pt"])
def test_a_model_of_another_format_is_not_overwritten(hub, chain, tmp_path, name):
    (tmp_path / "model" / name).parent.mkdir(parents=True)
    (tmp_path / "model" / name).write_bytes(b"weights")
    (tmp_path / "model" / "README.md").write_text("Mine.")
    before = hub.commit("me/model", tmp_path / "model", "main")
    with pytest.raises(ValueError, match=r"'me/model' holds weights and no chain.json: it is not a chain"):
        chain.push_to_hub("me/model")
    assert hub.head("me/model") == before


@pytest.mark.parametrize("revision", [None, "v2"])
def test_what_is_to_be_private_does_not_go_where_all_can_read_it(hub, chain, shorter, revision):
    before = shorter.push_to_hub("me/pushed").oid
    sent = list(hub.uploads)
    public = (
        r"'me/pushed' is there and public, and private=True .*Make it private in its settings.*or leave private out"
    )
    with pytest.raises(ValueError, match=public):
        chain.push_to_hub("me/pushed", private=True, revision=revision)
    assert hub.repositories["me/pushed"].references == {"main": before} and hub.uploads == sent
    hub.repositories["me/pushed"].private = True
    chain.push_to_hub("me/pushed", private=True, revision=revision)
    assert hub.head("me/pushed", revision or "main") != before


def test_a_branch_of_its_own(hub, chain, shorter):
    before = shorter.push_to_hub("me/pushed").oid
    commit = chain.push_to_hub("me/pushed", revision="v2")
    assert hub.head("me/pushed") == before and hub.head("me/pushed", "v2") == commit.oid
    assert Chain.from_pretrained("me/pushed", revision="v2").checksum == chain.checksum


def test_the_cards_say_where_it_is(hub, chain):
    chain.push_to_hub("me/pushed")
    card = hub.files("me/pushed")["README.md"].decode()
    assert 'from_chain("me/pushed", num_parameters=' in card
    name = chain.anchors[1].name
    beside = hub.files("me/pushed")[f"{name}/README.md"].decode()
    assert f'from_pretrained("me/pushed", subfolder="{name}")' in beside


def test_a_card_that_somebody_wrote_is_pushed(hub, chain, tmp_path):
    chain.save_pretrained(tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("---\nlicense: mit\n---\nMy own words.\n")
    Chain.from_pretrained(tmp_path / "copy").push_to_hub("me/pushed")
    assert hub.files("me/pushed")["README.md"].decode().endswith("My own words.\n")


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
        ("me/a chain", None, "'me/a chain'. This is not the id of a repository: it must be 'owner/name'"),
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


def test_the_command_pushes_and_says_how_to_use_it(hub, chain, capsys):
    flags = ["--private", "--revision", "v2", "--message", "From the shell", "--own-repos"]
    assert main(["push", str(chain.path), "me/pushed", *flags]) == 0
    commit = hub.head("me/pushed", "v2")
    assert f'from_chain("me/pushed", num_parameters=..., revision="{commit}")' in capsys.readouterr().out
    assert hub.repositories["me/pushed"].messages[commit] == "From the shell"
    assert len(hub.repositories) == 4 and all(repository.private for repository in hub.repositories.values())
    assert all(anchor.repo for anchor in Chain.from_pretrained("me/pushed", revision="v2").anchors)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["me/pushed"], 2, "cbd-trl push CHAIN REPO"),
        (["CHAIN", "you/pushed"], 1, "cannot be pushed to 'you/pushed'. The token may not do that"),
        (["CHAIN", "me/pushed", "--public"], 2, "There is no flag '--public'"),
    ],
)
def test_the_command_refuses_in_one_line(hub, chain, capsys, flags, code, message):
    assert main(["push", *(str(chain.path) if flag == "CHAIN" else flag for flag in flags)]) == code
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
