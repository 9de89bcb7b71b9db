import copy

import pytest
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cbd_trl.teachers.local import LocalTeacher, load_teacher
from cbd_trl.utils.tokenizers import check_same_tokenizer, check_vocabularies, find_tokenizer, shared_vocabulary
from tests.tiny import tiny_model
from tests.tokenizer import WORDS, tiny_tokenizer


def test_a_model_becomes_frozen_and_stays_in_eval_mode() -> None:
    model = tiny_model("llama").train()
    teacher = LocalTeacher(load_teacher(model, tiny_model("llama", seed=1)))
    teacher.place(Accelerator(cpu=True))
    assert teacher.model is model and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_path_loads_in_the_dtype_and_attention_of_the_student(tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    student = tiny_model("llama", attn_implementation="eager").to(torch.bfloat16)
    teacher = load_teacher(str(tmp_path), student)
    assert teacher.dtype == torch.bfloat16 and teacher.config._attn_implementation == "eager"
    chosen = load_teacher(str(tmp_path), student, init_kwargs={"dtype": torch.float32, "attn_implementation": "sdpa"})
    assert chosen.dtype == torch.float32 and chosen.config._attn_implementation == "sdpa"


def test_revision_and_remote_code_reach_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def load(name: str, **kwargs: object) -> PreTrainedModel:
        seen.update(kwargs, name=name)
        return tiny_model("llama", seed=1)

    monkeypatch.setattr("cbd_trl.teachers.local.load_causal_lm", load)
    load_teacher("me/teacher", tiny_model("llama"), revision="v2", trust_remote_code=True)
    assert (seen["name"], seen["revision"], seen["trust_remote_code"]) == ("me/teacher", "v2", True)


def test_what_cannot_be_a_teacher_is_refused() -> None:
    student = tiny_model("llama")
    with pytest.raises(ValueError, match=r"shares parameters with the student.*Give a copy"):
        load_teacher(student, student)
    with pytest.raises(ValueError, match="teacher_model is a model already"):
        load_teacher(copy.deepcopy(student), student, revision="main")
    with pytest.raises(TypeError, match="teacher_model is a int"):
        load_teacher(3, student)  # type: ignore[arg-type]


def test_padded_vocabularies_share_the_smaller_number_of_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama", vocab_size=72)
    assert check_vocabularies(student, teacher, tokenizer) == 64
    assert check_vocabularies(teacher, student, tokenizer) == 64


def test_too_few_rows_for_the_tokenizer_are_refused() -> None:
    assert shared_vocabulary(60, 64, 60) == 60
    with pytest.raises(
        ValueError, match=r"60 tokens, the student 64 rows and the teacher 50: the teacher has no logit"
    ):
        shared_vocabulary(64, 50, 60)


def test_another_tokenizer_is_refused_with_the_way_out(tokenizer: PreTrainedTokenizerFast) -> None:
    models = tiny_model("llama"), tiny_model("llama", seed=1)
    other = tiny_tokenizer(WORDS[::-1])
    with pytest.raises(ValueError, match=r"54 of the student's 60 tokens have another id.*BridgeDistillTrainer"):
        check_vocabularies(*models, tokenizer, teacher_tokenizer=other)


def test_the_tokenizer_beside_the_teacher_is_found_and_compared(tokenizer: PreTrainedTokenizerFast, tmp_path) -> None:
    student = tiny_model("llama")
    tiny_model("llama", seed=1).save_pretrained(tmp_path)
    assert find_tokenizer(str(tmp_path), None, local_only=True) is None
    tiny_tokenizer(WORDS[::-1]).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), student)
    for path in (str(tmp_path), None):  # None: a model in memory, whose config says where it came from
        with pytest.raises(ValueError, match="BridgeDistillTrainer"):
            check_vocabularies(student, teacher, tokenizer, teacher_name_or_path=path)


def test_further_tokens_of_the_teacher_are_no_difference(tokenizer: PreTrainedTokenizerFast) -> None:
    more = tiny_tokenizer()
    more.add_tokens(["extra"])
    check_same_tokenizer(tokenizer, more)
    with pytest.raises(ValueError, match=r"such as 'extra': 60 against None"):
        check_same_tokenizer(more, tokenizer)


def test_the_same_vocabulary_split_differently_is_refused() -> None:
    from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit

    plain, splitting = tiny_tokenizer(), tiny_tokenizer()
    backend = splitting.backend_tokenizer
    backend.pre_tokenizer = Sequence([WhitespaceSplit(), Split("'", "isolated")])
    with pytest.raises(ValueError, match="the vocabularies agree but the same text becomes"):
        check_same_tokenizer(plain, splitting)
