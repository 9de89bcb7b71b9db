"""Which teachers and tokenizers can be learned from across vocabularies, and how a wrong one is found out."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers.normalizers import Lowercase
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from cbd_trl import BridgeDistillTrainer
from cbd_trl.bridge.bridge import Bridge
from cbd_trl.trainers.bridge_teacher import TeacherWatch
from tests.bridge.alignment_helpers import normalizing, padded
from tests.bridge.tokenizers_of_kinds import make_tokenizer
from tests.trainers.bridge_runs import (
    make_bridge,
    make_bridge_config,
    student,
    students_tokenizer,
    teacher,
    teachers_tokenizer,
    texts,
)
from tests.training import assert_same_gradient, one_step

SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_a_teacher_by_path_brings_its_tokenizer(tmp_path: Path) -> None:
    teacher().save_pretrained(tmp_path)
    teachers_tokenizer().save_pretrained(tmp_path)
    found = BridgeDistillTrainer(
        student(), str(tmp_path), make_bridge_config(), Dataset.from_dict({"text": texts()}),
        processing_class=students_tokenizer(),
    )  # fmt: skip
    (ours, our_grads), (theirs, their_grads) = one_step(found), one_step(make_bridge())
    assert_same_gradient(our_grads, their_grads)
    assert ours["kd"] == pytest.approx(theirs["kd"], rel=1e-5)


def test_a_wrong_tokenizer_is_caught_by_its_size() -> None:
    with pytest.raises(ValueError, match=r"The teacher has 300 vocabulary rows, .* \(420 tokens\), has 420 tokens"):
        make_bridge(teacher_model=teacher(vocab_size=300))
    with pytest.raises(ValueError, match=r"The student has 200 vocabulary rows, .* as `processing_class`"):
        make_bridge(model=student(vocab_size=200))


def test_a_wrong_tokenizer_is_caught_by_the_loss() -> None:
    sure = teacher()
    with torch.no_grad():
        sure.get_output_embeddings().weight *= 8
    rows = Dataset.from_dict({"text": texts(8)})
    guess = f"{math.log(420):.2f}"
    with pytest.raises(ValueError, match=rf"guessing among its 420 tokens costs {guess}: .* \(300 tokens\), the teac"):
        make_bridge(teacher_model=sure, train_dataset=rows, per_device_train_batch_size=8).train()


def test_what_a_teacher_that_knows_little_may_be(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    guess = math.log(420)

    def look(mean: float) -> None:
        watch = TeacherWatch(Bridge(students_tokenizer(), teachers_tokenizer()), 420)
        watch.look(40 * mean, 40)
        assert watch.waiting
        watch.look(24 * mean, 24)

    look(0.7 * guess)
    assert not caplog.text
    look(0.9 * guess)
    assert "own tokens is 5.44 nats, and guessing among its 420 tokens costs 6.04: so little is known" in caplog.text
    assert "The student's is" in caplog.text
    look(guess + 1.4)
    with pytest.raises(ValueError, match="it was not trained with the tokenizer it was given"):
        look(guess + 1.6)
    assert "pass that as `teacher_processing_class`" in caplog.text
    for bad in (math.nan, math.inf):
        with pytest.raises(
            ValueError, match=rf"is {bad} nats, .* its weights are damaged, .* Load it from a good copy"
        ):
            look(bad)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("role", ["model", "teacher_model"])
def test_damaged_heads_are_refused(role: str, bad: float) -> None:
    damaged = student() if role == "model" else teacher()
    with torch.no_grad():
        damaged.get_output_embeddings().weight[3, 2] = bad
    with pytest.raises(
        ValueError, match=r"ForCausalLM computes is not finite \(NaN or infinity\): its weights are dam"
    ):
        make_bridge(**{role: damaged})


def test_a_tokenizer_that_is_not_the_students_own_is_suspicious(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    student().save_pretrained(tmp_path)
    students_tokenizer().save_pretrained(tmp_path)
    make_bridge(model=str(tmp_path))
    assert "another model's" not in caplog.text
    make_bridge(model=str(tmp_path), processing_class=make_tokenizer("byte_level", 300, seed=1))
    assert "of the 300 tokens of the `processing_class` have another id in the tokenizer saved with" in caplog.text
    assert "If the student was not given another vocabulary since, it is another model's" in caplog.text


def test_a_teacher_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the teacher made in memory: .* Pass `teacher_processing_class`; if it has"):
        make_bridge(teacher_processing_class=None)
    teacher().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="No tokenizer was found for the teacher bare:"):
        make_bridge(teacher_model=str(tmp_path / "bare"), teacher_processing_class=None)


def test_several_teachers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher_model is a list of 2: .* Give one teacher"):
        make_bridge(teacher_model=[teacher(), teacher()])


def test_a_tokenizer_that_shares_most_ids_is_caught_by_the_one_saved_with_the_teacher(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher().save_pretrained(tmp_path)
    make_tokenizer("byte_level", 420).save_pretrained(tmp_path)
    given = teachers_tokenizer()
    known = make_tokenizer("byte_level", 420).get_vocab()
    moved = [token for token, index in given.get_vocab().items() if known.get(token, index) != index]
    assert 0 < len(moved) < 100
    message = rf"{len(moved)} of the 420 tokens of the `teacher_processing_class` have another id .* saved with"
    with pytest.raises(ValueError, match=message + r" the teacher .*leave it out, .* pass it as a model"):
        make_bridge(teacher_model=str(tmp_path))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    make_bridge(teacher_model=type(teacher()).from_pretrained(tmp_path))
    assert "was not given another vocabulary since, it is another model's" in caplog.text
    # Tokens of another name or of no name are no contradiction.
    renamed = make_tokenizer("byte_level", 419)
    renamed.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    caplog.clear()
    make_bridge(teacher_model=str(tmp_path), teacher_processing_class=renamed)
    assert "another model's" not in caplog.text


def test_a_tokenizer_of_few_of_the_teachers_rows_is_suspicious(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    make_bridge(teacher_model=teacher(vocab_size=448))
    assert "vocabulary rows" not in caplog.text
    make_bridge(teacher_model=teacher(vocab_size=500))
    assert "The teacher has 500 vocabulary rows, and its tokenizer" in caplog.text
    assert "tokens for 420 of them" in caplog.text


def test_an_untrained_teacher_is_no_wrong_tokenizer(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    bland = teacher()
    with torch.no_grad():
        bland.get_output_embeddings().weight *= 1e-3
    logs, _ = one_step(make_bridge(teacher_model=bland, train_dataset=Dataset.from_dict({"text": texts(8)})))
    assert logs["kd"] > 0
    assert caplog.text.count("so little is known by a teacher that is hardly trained") == 1


def _t5() -> Any:
    return T5ForConditionalGeneration(T5Config(vocab_size=420, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: teacher("llama").model, "The teacher is a LlamaModel, which has no head over the vocabulary"),
        (lambda: teacher("gpt2").transformer, "The teacher is a GPT2Model, which has no head over the vocabulary"),
        (_t5, "The teacher is a T5ForConditionalGeneration, which writes an answer"),
        (
            lambda: BertForMaskedLM(BertConfig(vocab_size=420, initializer_range=0.5, **SMALL)),
            "BertForMaskedLM reads what follows a token",
        ),
    ],
    ids=["llama", "gpt2", "t5", "bert"],
)
def test_a_teacher_without_logits_of_the_next_token_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_bridge(teacher_model=make())


def test_a_teacher_saved_without_its_head_is_refused(tmp_path: Path) -> None:
    teacher("llama").model.save_pretrained(tmp_path / "body")
    teachers_tokenizer().save_pretrained(tmp_path / "body")
    with pytest.raises(ValueError, match=r"The teacher 'body' .*missing: lm_head\.weight.*a model without a head"):
        make_bridge(teacher_model=str(tmp_path / "body"), teacher_processing_class=None)
    tied = teacher("llama", tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    teachers_tokenizer().save_pretrained(tmp_path / "tied")
    make_bridge(teacher_model=str(tmp_path / "tied"), teacher_processing_class=None)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_text_that_does_not_survive_a_tokenizer_is_masked_and_counted(side: str) -> None:
    own, theirs = students_tokenizer(), teachers_tokenizer()
    how: dict[str, Any] = {}
    if side == "student":
        # A tokenizer without bytes: what it has no letters for is unknown to it.
        own = how["processing_class"] = make_tokenizer("unigram", 300)
    else:
        theirs = how["teacher_processing_class"] = normalizing("byte_level", Lowercase(), 420)
    ids = own("ba lo WXQ ri sta</s>")["input_ids"]
    logs, _ = one_step(make_bridge(train_dataset=Dataset.from_dict({"input_ids": [ids]}), **how))
    read = Bridge(own, theirs).read(padded([ids]))
    assert 0 < read.unaligned < read.scored
    assert logs["unaligned"] == pytest.approx(read.unaligned / read.scored)
    inputs = torch.tensor([ids])
    assert logs["ce"] == pytest.approx(student()(input_ids=inputs, labels=inputs).loss.item(), rel=1e-5)
