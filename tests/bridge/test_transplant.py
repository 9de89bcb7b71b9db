"""Transplants proved by the models' logits: on ids, on permuted ids, and row by row."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from cbd_trl.bridge.transplant import METHODS, transplant_vocabulary
from cbd_trl.bridge.vocabulary import match_vocabularies
from tests.bridge.tokenizers_of_kinds import letters, make_tokenizer
from tests.tiny import MIXTURES, by_head, randomize, tiny_model
from tests.tokenizer import tiny_tokenizer

_LETTERS = [chr(ord("a") + place) for place in range(26)] + [chr(ord("A") + place) for place in range(26)]


def _tokenizer(
    tokens: list[str], pad: int = 0, merges: list[tuple[str, str]] | None = None
) -> PreTrainedTokenizerFast:
    """These tokens after `pad` marks without a role and the three that have one."""
    special = [f"<{place}>" for place in range(pad)] + ["<pad>", "<s>", "</s>"]
    vocabulary = {token: index for index, token in enumerate([*special, *tokens])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[:pad],
    )


def _full(pad: int = 0, tokens: list[str] | None = None) -> PreTrainedTokenizerFast:
    return _tokenizer(_LETTERS if tokens is None else tokens, pad)


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def _rows(model: PreTrainedModel) -> list[torch.Tensor]:
    head = model.get_output_embeddings()
    return [model.get_input_embeddings().weight, head.weight, *([head.bias] if head.bias is not None else [])]


@pytest.mark.parametrize(("family", "tied"), by_head())
def test_every_family_says_the_same_with_permuted_ids_and_after_a_round_trip(
    family: str, tied: bool, tmp_path
) -> None:
    old, new = _full(9), _full(9, _LETTERS[::-1])
    model = tiny_model(family, tie_word_embeddings=tied)
    before = copy.deepcopy(model.state_dict())
    made = transplant_vocabulary(model, old, new)
    assert type(made) is type(model) and made.config.vocab_size == len(new) == 64
    ids = torch.tensor([[10, 20, 40, 63, 12, 11, 9, 3]])
    names, new_ids = old.convert_ids_to_tokens(range(64)), new.get_vocab()
    order = torch.tensor([new_ids[name] for name in names])
    assert torch.equal(_logits(made, order[ids])[..., order], _logits(model, ids))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert (made.get_output_embeddings().weight is made.get_input_embeddings().weight) is tied
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    if family in MIXTURES:
        again.set_experts_implementation("eager")
    assert torch.equal(_logits(again, order[ids]), _logits(made, order[ids]))
    assert made.num_parameters() == again.num_parameters() == model.num_parameters()


@pytest.mark.parametrize(("family", "tied"), by_head())
def test_every_family_takes_fewer_and_more_tokens(family: str, tied: bool, tmp_path) -> None:
    old, model = _full(9), tiny_model(family, tie_word_embeddings=tied)
    new = _tokenizer(["b", "a", "ba", "aba", "é"])
    made = transplant_vocabulary(model, old, new, "mean")
    was = old.get_vocab()
    a, b, pad, bos, eos = (was[token] for token in ("a", "b", "<pad>", "<s>", "</s>"))
    for table, rows in zip(_rows(model), _rows(made), strict=True):
        expected = [*table[[pad, bos, eos, b, a]], table[[b, a]].mean(0), table[[a, b, a]].mean(0), table.mean(0)]
        torch.testing.assert_close(rows, torch.stack(expected))
        assert torch.equal(rows[:5], table[[pad, bos, eos, b, a]])
    ids = torch.tensor([[1, 4, 3, 4]])
    theirs = _logits(model, torch.tensor([[bos, a, b, a]]))[..., [pad, bos, eos, b, a]]
    torch.testing.assert_close(_logits(made, ids)[..., :5], theirs, rtol=0, atol=1e-5 * float(theirs.std()))
    made.save_pretrained(tmp_path)
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), _logits(made, ids))
    assert not any(getattr(module, "vocab_size", 8) != 8 for module in made.modules())
    made.train()(input_ids=ids, labels=ids).loss.backward()


def test_padding_rows_are_no_tokens_and_bfloat16_is_copied_bit_by_bit() -> None:
    old, model = _full(), tiny_model("llama", vocab_size=80).to(torch.bfloat16)
    made = transplant_vocabulary(model, old, old, pad_to_multiple_of=16)
    table, rows = _rows(model)[0], _rows(made)[0]
    assert rows.shape == (64, 32) and made.dtype == torch.bfloat16 and torch.equal(rows[: len(old)], table[: len(old)])
    assert torch.equal(rows[len(old) :], table[: len(old)].float().mean(0).bfloat16().expand(64 - len(old), -1))
    assert len(_rows(transplant_vocabulary(model, old, old))[0]) == len(old)


def test_weighted_counts_bytes_and_place_and_is_moved_to_the_mean() -> None:
    old = _tokenizer(["a", "é", "b"])
    new = _tokenizer(["a", "aéb"])
    table = torch.cat(_rows(model := tiny_model("llama"))[:1])
    made = transplant_vocabulary(model, old, new, "weighted")
    weights = torch.tensor([1 * 0.75**2, 2 * 0.75, 1.0])
    expected = 0.8 * (weights[:, None] * table[[3, 4, 5]]).sum(0) / weights.sum() + 0.2 * table[:6].mean(0)
    torch.testing.assert_close(_rows(made)[0][4], expected)


def _like(donor: PreTrainedModel, rotation: torch.Tensor, rows: list[int]) -> PreTrainedModel:
    """A model whose tables are some rows of the donor's, turned."""
    model = tiny_model("llama", vocab_size=len(rows), tie_word_embeddings=donor.config.tie_word_embeddings)
    with torch.no_grad():
        for ours, theirs in zip(_rows(model), _rows(donor), strict=True):
            ours.copy_(theirs[rows] @ rotation)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_omp_finds_the_rows_of_a_donor_that_is_the_model_turned(tied: bool) -> None:
    old, new = _tokenizer(_LETTERS), _tokenizer([*_LETTERS, "ab", "ca"])
    donor = tiny_model("llama", vocab_size=len(new), tie_word_embeddings=tied)
    ids = new.get_vocab()
    with torch.no_grad():
        for table in _rows(donor):
            table[ids["ab"]] = 0.5 * table[ids["c"]] + 0.3 * table[ids["d"]]
            table[ids["ca"]] = 0.4 * table[ids["x"]] - 0.3 * table[ids["y"]]
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3))).Q
    model = _like(donor, rotation, list(range(len(old))))
    made = transplant_vocabulary(model, old, new, "omp", donor_model=donor)
    for ours, theirs in zip(_rows(made), _rows(donor), strict=True):
        torch.testing.assert_close(ours, theirs @ rotation, rtol=1e-4, atol=1e-5)
    one = transplant_vocabulary(model, old, new, "omp", donor_model=donor, atoms=1)
    assert not torch.allclose(_rows(one)[0], _rows(donor)[0] @ rotation, atol=1e-2)


def test_omp_makes_no_row_longer_than_those_taken_over() -> None:
    old, new = _tokenizer(_LETTERS), _tokenizer([*_LETTERS, "ab"])
    donor, model = tiny_model("gpt2", vocab_size=len(new)), tiny_model("llama", seed=1)
    with torch.no_grad():
        donor.get_input_embeddings().weight[-1] *= 100
    made = transplant_vocabulary(model, old, new, "omp", donor_model=donor)
    lengths = _rows(made)[0].norm(dim=1)
    torch.testing.assert_close(lengths[-1], lengths[3:-1].max())


def test_a_bias_of_the_head_goes_along() -> None:
    old, new = _tokenizer(["a", "b"]), _tokenizer(["ab", "b"])
    model = tiny_model("llama")
    model.lm_head = torch.nn.Linear(32, 64)
    randomize(model)
    bias = model.lm_head.bias
    made = transplant_vocabulary(model, old, new, "mean")
    torch.testing.assert_close(made.lm_head.bias, torch.stack([*bias[:3], bias[[3, 4]].mean(), bias[4]]))
    donor = tiny_model("llama", seed=1)
    assert transplant_vocabulary(model, old, new, "omp", donor_model=donor).lm_head.bias.shape == (5,)


def test_configs_name_the_new_ids() -> None:
    old, new = _full(9), _tokenizer(["b", "a"], pad=3)
    model = tiny_model("llama", pad_token_id=9, bos_token_id=10, eos_token_id=[11, 1, 5])
    model.generation_config.update(
        pad_token_id=9, eos_token_id=11, bad_words_ids=[[20]], temperature=0.7, do_sample=True
    )
    model.config._name_or_path = model.name_or_path = "some/model"
    assert model.get_input_embeddings().padding_idx == 9
    made = transplant_vocabulary(model, old, new)
    # <5> is no token any more, <1> is.
    assert (made.config.pad_token_id, made.config.bos_token_id, made.config.eos_token_id) == (3, 4, [5, 1])
    generation = made.generation_config
    assert (generation.pad_token_id, generation.eos_token_id, generation.temperature) == (3, 5, 0.7)
    assert generation.bad_words_ids is None and model.generation_config.bad_words_ids == [[20]]
    assert made.get_input_embeddings().padding_idx == 3 and made.name_or_path == made.config._name_or_path == ""
    unpadded = letters("a", eos_token="</s>")
    assert transplant_vocabulary(model, old, unpadded).get_input_embeddings().padding_idx is None


def test_what_is_frozen_stays_frozen() -> None:
    model = tiny_model("llama")
    model.get_input_embeddings().requires_grad_(False)
    made = transplant_vocabulary(model, _full(), _full())
    assert [table.requires_grad for table in _rows(made)] == [False, True]


@pytest.mark.parametrize(
    "kinds", [("byte_level", "byte_fallback"), ("byte_fallback", "byte_level"), ("byte_level", "unigram")]
)
def test_a_trained_tokenizer_of_another_kind_takes_the_place(kinds: tuple[str, str]) -> None:
    old, new = make_tokenizer(kinds[0], 400), make_tokenizer(kinds[1], 500, seed=1)
    model = tiny_model("llama", vocab_size=len(old), tie_word_embeddings=True)
    match = match_vocabularies(old, new)
    made = transplant_vocabulary(model, old, new, "mean")
    table, rows = _rows(model)[0], _rows(made)[0]
    assert match.built and len(rows) == len(new)
    assert torch.equal(rows[list(match.source)], table[list(match.source.values())])
    for index, pieces in match.built.items():
        torch.testing.assert_close(rows[index], table[list(pieces)].mean(0))
    assert rows[list(match.built)].norm(dim=1).max() <= table.norm(dim=1).max()
    ids = torch.tensor([new("baké lomün sta")["input_ids"]])
    assert _logits(made, ids).isfinite().all()


def test_wrong_arguments_are_refused() -> None:
    old, new, model = _full(), _tokenizer(["a", "ab"]), tiny_model("llama")
    with pytest.raises(ValueError, match=r"'weigthed'.*mean, weighted, omp.*'weighted'"):
        transplant_vocabulary(model, old, new, "weigthed")
    with pytest.raises(ValueError, match=r"'omp'.*`donor_model`"):
        transplant_vocabulary(model, old, new, "omp")
    for method in METHODS[:2]:
        with pytest.raises(ValueError, match=rf"'{method}'.*`donor_model`"):
            transplant_vocabulary(model, old, new, method, donor_model=model)
    with pytest.raises(ValueError, match=r"atoms.*\b0 and 1\b"):
        transplant_vocabulary(model, old, new, "omp", donor_model=model, atoms=0)
    with pytest.raises(ValueError, match=r"pad_to_multiple_of.*\b64 and 0\b"):
        transplant_vocabulary(model, old, new, pad_to_multiple_of=0)


def test_a_tokenizer_that_is_not_the_models_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"old_tokenizer.*\b350\b.*\b64\b"):
        transplant_vocabulary(model, make_tokenizer(size=351), _full())
    with pytest.raises(ValueError, match=r"new_tokenizer.*\b54\b.*donor_model.*\b20\b"):
        donor = tiny_model("llama", vocab_size=20)
        transplant_vocabulary(model, _tokenizer(["a"]), _full(), "omp", donor_model=donor)
    with pytest.raises(ValueError, match=r"\b4 and 4\b"):
        transplant_vocabulary(model, _tokenizer(["a"]), _tokenizer(["b"]))
    with pytest.raises(ValueError, match="pre-tokenizer"):
        transplant_vocabulary(model, tiny_tokenizer(), _full())


def test_a_model_without_plain_tables_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model.*Linear.*merge_and_unload"):
        transplant_vocabulary(torch.nn.Linear(2, 2), _full(), _full())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model.*offloaded"):
        transplant_vocabulary(tiny_model("llama").to("meta"), _full(), _full())
    model = tiny_model("llama")
    quantized = torch.zeros(64, 32, dtype=torch.int8)
    model.get_input_embeddings().weight = torch.nn.Parameter(quantized, requires_grad=False)
    with pytest.raises(ValueError, match=r"model.*torch\.int8"):
        transplant_vocabulary(model, _full(), _full())
