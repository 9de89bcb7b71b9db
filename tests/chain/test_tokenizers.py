"""A chain has one tokenizer: what its hash sees, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer

import cbd_trl.chain.folders as folders
from cbd_trl import Chain, build_chain
from cbd_trl.chain.chain import write_anchor
from cbd_trl.chain.source import Source
from cbd_trl.utils.tokenizers import stored_tokenizer_hash, tokenizer_hash
from tests.bridge.tokenizers_of_kinds import KINDS, make_tokenizer
from tests.build.apart import make, sizes
from tests.chain.helpers import chain_config, chain_rows
from tests.tiny import tiny_model
from tests.tokenizer import WORDS, tiny_tokenizer

BLOCKS = [[0], [1], [2, 3]]
WORDS_SWAPPED = [*WORDS[:9], WORDS[10], WORDS[9], *WORDS[11:]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hash_is_that_of_what_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(kind, 400)
    tokenizer.save_pretrained(tmp_path)
    assert stored_tokenizer_hash(tmp_path) == tokenizer_hash(tokenizer)
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_hash(tokenizer)


def _called(tokenizer: Any) -> None:
    tokenizer(["ba ké", "lo"], padding=True, truncation=True, max_length=3)


def _padded_and_ended(tokenizer: Any) -> None:
    tokenizer.pad_token, tokenizer.eos_token = tokenizer.eos_token, "<user>"


def _with_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages }}"


@pytest.mark.parametrize("change", [_called, _padded_and_ended, _with_template])
def test_training_with_a_tokenizer_leaves_its_hash(change: Callable[[Any], None]) -> None:
    tokenizer = make_tokenizer()
    change(tokenizer)
    assert tokenizer_hash(tokenizer) == tokenizer_hash(make_tokenizer())


def _begun_otherwise(tokenizer: Any) -> None:
    tokenizer.bos_token = "<user>"


def _with_a_token(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<more>"])


def _in_lower_case(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def _with_other_merges(tokenizer: Any) -> None:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["merges"].reverse()
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(backend))


@pytest.mark.parametrize("change", [_begun_otherwise, _with_a_token, _in_lower_case, _with_other_merges])
def test_what_changes_ids_changes_the_hash(change: Callable[[Any], None]) -> None:
    tokenizer = make_tokenizer()
    change(tokenizer)
    assert tokenizer_hash(tokenizer) != tokenizer_hash(make_tokenizer())


def test_a_folder_without_a_tokenizer_has_no_hash(tmp_path: Path) -> None:
    assert stored_tokenizer_hash(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert stored_tokenizer_hash(tmp_path) is None
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    first = stored_tokenizer_hash(tmp_path)
    (tmp_path / "vocab.txt").write_text("b\na\n")
    assert None is not first != stored_tokenizer_hash(tmp_path)


def test_a_tokenizer_that_saves_nothing_is_refused() -> None:
    class Silent:
        def save_pretrained(self, folder: str) -> None:
            pass

    with pytest.raises(ValueError, match=r"A Silent saves no file with its tokens .*AutoTokenizer"):
        tokenizer_hash(Silent())  # type: ignore[arg-type]


def write(folder: Path, *tokenizers: Any) -> Path:
    """A chain of two anchors with these tokenizers."""
    models = [tiny_model("llama"), tiny_model("llama", num_hidden_layers=3)]
    for name, model, tokenizer in zip(("large", "small"), models, tokenizers, strict=True):

        def fill(temporary: Path, model: Any = model, tokenizer: Any = tokenizer) -> None:
            model.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)

        parent = None if name == "large" else "large"
        write_anchor(folder, {"name": name, "parent": parent, "blocks": parent and BLOCKS}, fill)
    return folder


MIXED = [
    (
        (None, WORDS_SWAPPED),
        r"2 of large's 60 tokens have another id in small's vocabulary of 60, such as 'w9': 15 against 16",
    ),
    ((None, WORDS[:50]), r"4 of large's 60 tokens have another id in small's vocabulary of 56, such as 'w50': 56 ag"),
    ((WORDS[:50], None), r"4 of small's 60 tokens have another id in large's vocabulary of 56, such as 'w50': 56 ag"),
]


@pytest.mark.parametrize(("words", "difference"), MIXED)
def test_anchors_with_different_tokenizers_are_refused(words: Any, difference: str, tmp_path: Path) -> None:
    """Before the second one is in the chain, and in a chain that came to be otherwise."""
    tokenizers = [tiny_tokenizer(own) for own in words]
    message = (
        rf"chain\.json: the anchors 'large' and 'small' have different tokenizers: {difference}.*interpolated token "
        r"by token.*bridge=BridgeStep.*transplant_vocabulary"
    )
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "written", *tokenizers)
    assert [anchor.name for anchor in Chain.from_pretrained(tmp_path / "written").anchors] == ["large"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "check_one_tokenizer", lambda *_: None)
        write(tmp_path / "chain", *tokenizers)
    with pytest.raises(ValueError, match=message):
        Chain.from_pretrained(tmp_path / "chain")


def test_rules_that_differ_are_named(tmp_path: Path) -> None:
    other = tiny_tokenizer()
    other.bos_token = "<user>"
    with pytest.raises(ValueError, match=r"they have one vocabulary, but other rules for text or another begin"):
        write(tmp_path, tiny_tokenizer(), other)


def test_an_anchor_without_a_tokenizer_is_no_obstacle(tmp_path: Path) -> None:
    write(tmp_path, tiny_tokenizer(), None)
    hashes = [anchor.tokenizer_sha256 for anchor in Chain.from_pretrained(tmp_path).anchors]
    assert hashes == [tokenizer_hash(tiny_tokenizer()), None]


def test_existing_models_with_different_tokenizers_are_refused(tmp_path: Path) -> None:
    sizes()[1].save_pretrained(tmp_path / "other")
    tiny_tokenizer(WORDS_SWAPPED).save_pretrained(tmp_path / "other")
    message = r"anchors\[1\] .*such as 'w9': 15 against 16.*share one tokenizer: .*bridge=BridgeStep"
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "chain", [sizes()[0], tmp_path / "other"])
    assert not (tmp_path / "chain").exists()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "saved")
    tiny_tokenizer().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_tokenizer_with_other_ids_than_the_models_own_is_refused(saved: Path, tmp_path: Path) -> None:
    message = (
        r"The source \('.*saved'\) was saved with another tokenizer than the `processing_class` given for it: 2 of "
        r"its own 60 tokens have another id .*Leave `processing_class` out"
    )
    options = {"dataset": chain_rows(), "output_dir": tmp_path / "chain", "args": chain_config()}
    with pytest.raises(ValueError, match=message):
        build_chain(saved, [0.5], processing_class=tiny_tokenizer(WORDS_SWAPPED), **options)
    assert not (tmp_path / "chain").exists()


@pytest.mark.parametrize("words", [WORDS, WORDS[:50], [*WORDS, "w54"]])
def test_a_tokenizer_with_more_or_fewer_tokens_may_stand_for_the_models_own(words: list[str], saved: Path) -> None:
    given = tiny_tokenizer(words)
    assert Source(saved).tokenizer_or(given).get_vocab() == given.get_vocab()


def test_a_folder_without_a_tokenizer_gives_no_empty_one(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"No tokenizer could be loaded from the source .*no files of one.*Pass"):
        Source(tmp_path).tokenizer_or(None)


def test_a_tokenizer_that_is_too_long_for_the_model_is_refused(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(60)]
    with pytest.raises(ValueError, match=r"The source has 64 vocabulary rows, and the tokenizer .* has 66 tokens"):
        build_chain(
            tiny_model("llama"),
            [0.5],
            dataset=chain_rows(),
            output_dir=tmp_path / "chain",
            args=chain_config(),
            processing_class=tiny_tokenizer(words),
        )
