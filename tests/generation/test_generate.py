"""What a teacher's completions are, whatever comes with them in a batch."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig
from trl import SFTConfig, SFTTrainer

from cbd_trl.generation import DecodingConfig
from cbd_trl.generation.completer import DrawByRow, row_numbers
from tests.generation.helpers import PROMPTS, alone, complete, rows_of, tiny_teacher
from tests.processes import launch
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"min_new_tokens": 5}])
def test_greedy_is_what_generate_gives_for_each_row_alone(tmp_path, family, options):
    model, tokenizer = tiny_teacher(family, **({"n_layer": 2} if family == "gpt2" else {})), tiny_tokenizer()
    corpus = complete(tmp_path / "out.jsonl", model, do_sample=False, **options)
    rows = rows_of(corpus.file)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in PROMPTS]
    for row in rows:
        ids = tokenizer(row["prompt"])["input_ids"]
        new = alone(model, ids, **options)
        assert row["prompt"] + row["completion"] == tokenizer.decode([*ids, *new], skip_special_tokens=True)
        assert row["finish_reason"] == ("stop" if new[-1] == 2 else "length")


def test_both_ways_to_end_are_met_and_counted(tmp_path):
    corpus = complete(tmp_path / "out.jsonl", num_return_sequences=4)
    reasons = Counter(row["finish_reason"] for row in rows_of(corpus.file))
    assert set(reasons) == {"stop", "length"}
    assert (corpus.rows, corpus.truncated) == (28, reasons["length"])


def test_every_token_that_the_model_or_the_tokenizer_ends_with_ends_a_completion(tmp_path):
    model = tiny_teacher()
    likely = Counter(
        word for row in rows_of(complete(tmp_path / "a.jsonl", model).file) for word in row["completion"].split()
    )
    word = likely.most_common(1)[0][0]
    model.generation_config = GenerationConfig(eos_token_id=[tiny_tokenizer().convert_tokens_to_ids(word)])
    rows = rows_of(complete(tmp_path / "b.jsonl", model).file)
    assert all(word not in row["completion"].split() for row in rows)
    assert "stop" in {row["finish_reason"] for row in rows}


def test_the_teachers_own_settings_change_nothing(tmp_path):
    plain, model = tiny_teacher(), tiny_teacher()
    model.generation_config = own = GenerationConfig(
        eos_token_id=2, temperature=0.1, top_k=1, do_sample=True, repetition_penalty=3.0, suppress_tokens=[7, 8, 9]
    )
    files = [complete(tmp_path / f"{i}.jsonl", teacher).file for i, teacher in enumerate((plain, model))]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert model.generation_config is own


def test_a_seed_gives_the_same_file_and_another_seed_another(tmp_path):
    one, same, other = (complete(tmp_path / f"{i}.jsonl", seed=seed).file for i, seed in enumerate((0, 0, 1)))
    assert one.read_bytes() == same.read_bytes()
    assert [row["completion"] for row in rows_of(one)] != [row["completion"] for row in rows_of(other)]


@pytest.mark.parametrize("do_sample", [False, True])
def test_the_batch_size_changes_nothing(tmp_path, do_sample):
    files = [complete(tmp_path / f"{size}.jsonl", do_sample=do_sample, batch_size=size).file for size in (1, 2, 7)]
    assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.parametrize(
    "options", [{"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 2}, {"top_p": 0.4}, {"min_p": 0.5}]
)
def test_every_option_of_the_draws_changes_them(tmp_path, options):
    plain, changed = complete(tmp_path / "a.jsonl"), complete(tmp_path / "b.jsonl", **options)
    assert plain.file.read_bytes() != changed.file.read_bytes()


def test_draws_among_one_token_are_greedy(tmp_path):
    greedy = complete(tmp_path / "a.jsonl", do_sample=False)
    for name, value in (("top_k", 1), ("top_p", 1e-9), ("min_p", 1.0), ("temperature", 1e-6)):
        assert complete(tmp_path / f"{name}.jsonl", **{name: value}).file.read_bytes() == greedy.file.read_bytes()


def test_several_completions_of_a_prompt_stand_together(tmp_path):
    rows = rows_of(complete(tmp_path / "out.jsonl", num_return_sequences=3).file)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in PROMPTS for _ in range(3)]
    assert any(len({row["completion"] for row in rows[i : i + 3]}) == 3 for i in range(0, 21, 3))


def test_draws_follow_the_distribution():
    rows, scores = range(4000), torch.tensor([1.0, -torch.inf, 0.0, 2.0, -3.0, -torch.inf])
    draw = DrawByRow(0, rows, width=5, max_new_tokens=2)
    chosen = draw(torch.zeros(4000, 6, dtype=torch.long), scores.expand(4000, -1)).argmax(-1)
    shares = torch.bincount(chosen, minlength=6) / 4000
    # Four standard deviations of the share of a token.
    expected = scores.softmax(-1)
    assert ((shares - expected).abs() <= 4 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_a_draw_never_falls_on_what_is_excluded():
    draw = DrawByRow(0, [0], width=1, max_new_tokens=1)
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for number, token in ((0.0, 1), (0.5, 3), (1 - 2**-53, 3)):
        draw._numbers_NB = torch.tensor([[number]], dtype=torch.float64)
        assert draw(torch.zeros(1, 1), scores).argmax().item() == token


def test_numbers_of_a_row_are_its_own():
    rows = [row_numbers(seed, row, 5) for seed, row in itertools.product((0, 1), (0, 1, 11))]
    assert len({tuple(row.tolist()) for row in rows}) == 6
    assert torch.equal(row_numbers(1, 11, 5), rows[-1])
    # A longer row begins with the same numbers: max_new_tokens decides nothing but where a completion is cut.
    assert torch.equal(row_numbers(1, 11, 9)[:5], rows[-1])


def test_a_model_in_memory_is_left_as_it_was(tmp_path):
    model = tiny_teacher().train()
    complete(tmp_path / "out.jsonl", model)
    assert model.training


@pytest.mark.slow
def test_two_processes_write_the_same_file(tmp_path):
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    whole = complete(tmp_path / "one.jsonl", str(tmp_path / "teacher"), processing_class=None)
    launch("tests.generation.two_processes", str(tmp_path))
    assert (tmp_path / "two.jsonl").read_bytes() == whole.file.read_bytes()


def test_sft_trains_on_the_file(tmp_path):
    corpus = complete(tmp_path / "out.jsonl")
    args = SFTConfig(
        str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    student = tiny_model("llama", num_hidden_layers=1)
    data = Dataset.from_json(str(corpus.file), cache_dir=str(tmp_path / "cache"))
    trainer = SFTTrainer(student, args, train_dataset=data, processing_class=tiny_tokenizer())
    before = student.lm_head.weight.clone()
    trainer.train()
    assert not torch.equal(before, student.lm_head.weight)
    tokenizer, rows = tiny_tokenizer(), rows_of(corpus.file)
    # Scored are the completion, and the end that TRL puts behind it.
    for example, row in zip(trainer.train_dataset, rows, strict=True):
        scored = [token for token in example["labels"] if token != -100]
        assert scored == tokenizer(row["completion"] + "</s>")["input_ids"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: it must be at least 1"),
        ({"num_beams": 0, "do_sample": False}, "num_beams=0: it must be at least 1"),
        ({"num_return_sequences": 0}, "num_return_sequences=0: it must be at least 1"),
        ({"min_new_tokens": 300}, "min_new_tokens=300: it must be from 0 to max_new_tokens=256"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1: it must be from 0"),
        ({"temperature": 0.0}, "temperature=0.0: it divides the logits.*set do_sample=False"),
        ({"temperature": float("inf")}, "temperature=inf: .* above 0 and finite"),
        ({"top_k": -1}, "top_k=-1, top_p=1.0, min_p=0.0: top_k must be 0"),
        ({"top_p": 0.0}, "top_p=0.0.*top_p above 0 and at most 1"),
        ({"min_p": 1.5}, "min_p=1.5.* min_p from 0 to 1"),
        ({"do_sample": False, "temperature": 0.7}, "temperature=0.7 with do_sample=False: nothing is drawn"),
        ({"do_sample": False, "top_k": 5}, "top_k=5 with do_sample=False: nothing is drawn"),
        ({"do_sample": False, "num_return_sequences": 2}, "num_return_sequences=2 with do_sample=False"),
        ({"num_beams": 4}, "num_beams=4 with do_sample=True: a beam search takes the likeliest"),
    ],
)
def test_decoding_that_means_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DecodingConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: it must be at least 1"),
        ({"model_init_kwargs": {"dtype": "bfloat16"}}, "model_init_kwargs are for loading a teacher, but it is a"),
        ({"processing_class": None}, r"No tokenizer was found with the teacher \(a model made in memory\)"),
        ({"max_new_tokens": 64}, "max_new_tokens=64 and the teacher's context of 64 tokens leave no room"),
        ({"max_new_tokens": 60}, r"2 of 7 prompts leave no room .* such as row 2 with 6 tokens: .* at most 4 fit"),
    ],
)
def test_what_cannot_be_generated_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        complete(tmp_path / "out.jsonl", **options)
    assert not (tmp_path / "out.jsonl").exists()


def test_another_models_tokenizer_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"tokens up to id 59 and the teacher 32 vocabulary rows: it is another model"
    ):
        complete(tmp_path / "out.jsonl", tiny_teacher(vocab_size=32))


def test_logits_that_are_not_numbers_are_refused(tmp_path):
    model = tiny_teacher()
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(ValueError, match=r"logits are not numbers \(NaN\).*float32 or bfloat16"):
        complete(tmp_path / "out.jsonl", model, do_sample=False)
