"""A teacher that reads another prompt than the student: columns `teacher_prompt` and `teacher_messages`."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from torch import Tensor

from cbd_trl import BridgeDistillConfig, BridgeDistillTrainer, build_chain
from cbd_trl.cache import write_cache
from cbd_trl.utils.teacher_rows import PLACES, READ
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.trainers.runs import lora
from tests.training import OUTPUT, assert_same_gradient, make_config, make_trainer, one_step

_MARKED = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' </s>' }}{% endgeneration %}{{ ' ' }}{% else %}"
    "{{ message['content'] + ' </s> ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}"
    "{% endif %}"
)


def words(count: int, seed: int) -> str:
    generator = random.Random(seed)
    return " ".join(f"w{generator.randrange(54)}" for _ in range(count))


PROMPTS, HINTS, ANSWERS = (
    [words(count, seed) for seed, count in enumerate(counts, first)]
    for first, counts in ((0, (2, 5, 1, 3)), (10, (9, 1, 6, 4)), (20, (4, 2, 7, 5)))
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def rows_of(kind: str) -> Dataset:
    """The same prompts, hints and answers in each format."""
    rows: list[dict[str, Any]] = []
    for prompt, hint, answer in zip(PROMPTS, HINTS, ANSWERS, strict=True):
        if kind == "text":
            rows.append({"prompt": prompt, "teacher_prompt": f"{hint} {prompt}", "completion": f" {answer}"})
        elif kind == "chat":
            told = [user(hint), assistant("w1"), user(prompt)]
            rows.append({"prompt": [user(prompt)], "teacher_prompt": told, "completion": [assistant(answer)]})
        else:
            turns = [assistant(answer), user("w5"), assistant("w7 w8")]
            rows.append({"messages": [user(prompt), *turns], "teacher_messages": [user(f"{hint} {prompt}"), *turns]})
    return Dataset.from_list(rows)


def tokens_of(kind: str, number: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """What student and teacher read of a row, and which tokens of each are scored, written out by hand."""
    tokenizer = tiny_tokenizer()
    prompt, hint, answer = PROMPTS[number], HINTS[number], ANSWERS[number]
    turn = f"<user> {prompt} </s> <assistant>"
    parts = {
        "text": (prompt, f"{hint} {prompt}", [(answer, True), ("</s>", True)]),
        "chat": (turn, f"<user> {hint} </s> <assistant> w1 </s> {turn}", [(f"{answer} </s>", True)]),
        "turns": (
            turn,
            f"<user> {hint} {prompt} </s> <assistant>",
            [(f"{answer} </s>", True), ("<user> w5 </s> <assistant>", False), ("w7 w8 </s>", True)],
        ),
    }
    ours, theirs, rest = parts[kind]
    read: list[list[int]] = [tokenizer(text)["input_ids"] for text in (ours, theirs)]
    scored: list[list[int]] = [[], []]
    for text, is_scored in rest:
        more = tokenizer(text)["input_ids"]
        for ids, places in zip(read, scored, strict=True):
            places += range(len(ids), len(ids) + len(more)) if is_scored else []
            ids += more
    return read[0], scored[0], read[1], scored[1]


def naive(kind: str, student: Any, teachers: list[Any], most: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward KL, a row and a token at a time, and its gradient; rows of the student cut to `most` tokens."""
    student.zero_grad()
    values = []
    for number in range(len(PROMPTS)):
        ours, ours_at, theirs, theirs_at = tokens_of(kind, number)
        student_TV = student(input_ids=torch.tensor([ours])).logits[0].log_softmax(-1)
        with torch.no_grad():
            each = torch.stack([teacher(input_ids=torch.tensor([theirs])).logits[0] for teacher in teachers])
            teacher_UV = each.softmax(-1).mean(0)
        for one, other in zip(ours_at, theirs_at, strict=True):
            if most is None or one < most:
                assert ours[one] == theirs[other]
                values.append(F.kl_div(student_TV[one - 1], teacher_UV[other - 1], reduction="sum"))
    loss = torch.stack(values).mean()
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def trainer_of(kind: str, **how: Any) -> Any:
    tokenizer = tiny_tokenizer()
    if kind == "turns":
        tokenizer.chat_template = _MARKED
        how["assistant_only_loss"] = True
    dataset = how.pop("train_dataset", None) or rows_of(kind)
    return make_trainer(train_dataset=dataset, processing_class=tokenizer, ce_weight=0.0, kd_weight=1.0, **how)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("text", {}),
        ("chat", {}),
        ("turns", {}),
        ("text", {"packing": True, "per_device_train_batch_size": 3}),
        ("turns", {"packing": True, "per_device_train_batch_size": 4, "max_length": 48}),
        ("chat", {"padding_free": True, "max_length": None}),
        ("text", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "loss_chunk_size": 1}),
        ("text", {"max_length": 7}),
        ("text", {"packing": True, "max_length": 7, "per_device_train_batch_size": 4}),
    ],
    ids=str,
)
def test_it_is_the_naive_loop(kind: str, how: dict[str, Any]) -> None:
    """Value and gradient, in every format, padded, packed, accumulated and cut."""
    trainer = trainer_of(kind, **how)
    most = how.get("max_length", 32)
    expected, theirs = naive(kind, tiny_model("llama", seed=1, num_hidden_layers=2), [trainer.teacher_model], most)
    log, ours = one_step(trainer)
    assert log["kd"] == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradient(ours, theirs)


def test_two_teachers_read_it() -> None:
    teachers = [tiny_model("llama", seed=2), tiny_model("llama", seed=3)]
    trainer = trainer_of("text", teacher=teachers)
    expected, theirs = naive("text", tiny_model("llama", seed=1, num_hidden_layers=2), teachers)
    log, ours = one_step(trainer)
    assert log["kd"] == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradient(ours, theirs)


def test_self_distillation_learns_what_the_prompt_did() -> None:
    """The base with the hint teaches the adapter without it (context distillation)."""
    trainer = trainer_of(
        "chat", self_distillation=True, peft_config=lora(), max_steps=40, learning_rate=3e-2, max_length=64
    )
    base = tiny_model("llama", seed=1, num_hidden_layers=2)
    first, _ = naive("chat", base, [tiny_model("llama", seed=1, num_hidden_layers=2)])
    trainer.train()
    steps = [log["kd"] for log in trainer.state.log_history if "kd" in log]
    assert steps[0] == pytest.approx(first.item(), rel=1e-5) and steps[0] > 0.01
    assert steps[-1] < 0.5 * steps[0]


def test_layers_are_compared_at_the_same_tokens() -> None:
    """The hidden term of two layers, each behind the same tokens."""
    model = tiny_model("llama", seed=1, num_hidden_layers=2)
    student = tiny_model("llama", seed=1, num_hidden_layers=2)
    distances = []
    for number in range(len(PROMPTS)):
        ours, ours_at, theirs, theirs_at = tokens_of("text", number)
        states = zip(layer_outputs(model, ours), layer_outputs(model, theirs), strict=True)
        for mine_TD, yours_UD in states:
            mine_ND, yours_ND = (
                states_XD[torch.tensor(places) - 1]
                for states_XD, places in ((mine_TD, ours_at), (yours_UD, theirs_at))
            )
            distances.append(1 - F.cosine_similarity(mine_ND, yours_ND, dim=-1))
    log, _ = one_step(trainer_of("text", student=student, teacher=model, hidden_weight=1.0))
    assert log["hidden"] == pytest.approx(torch.cat(distances).mean().item(), rel=1e-4)


@torch.no_grad()
def layer_outputs(model: Any, ids: list[int]) -> list[Tensor]:
    """Of every layer, (T, D) each."""
    found: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda _, __, output: found.append(output)) for layer in model.model.layers]
    model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return [output[0] for output in found]


@pytest.mark.parametrize("how", [{}, {"packing": True, "max_length": 9, "per_device_train_batch_size": 4}], ids=str)
def test_a_cached_teacher_read_it_too(how: dict[str, Any], tmp_path: Path) -> None:
    rows = rows_of("text")
    config = make_config(max_length=9)
    write_cache(
        tiny_model("llama", seed=2), rows, tmp_path, processing_class=tiny_tokenizer(), args=config, kind="hidden"
    )
    cached = trainer_of("text", teacher_cache=str(tmp_path), eval_dataset=rows, **how)
    online = trainer_of("text", eval_dataset=rows, **how)
    assert cached.evaluate()["eval_kd"] == pytest.approx(online.evaluate()["eval_kd"], rel=1e-5)
    (log, ours), (expected, theirs) = one_step(cached), one_step(online)
    assert log["kd"] == pytest.approx(expected["kd"], rel=1e-5)
    assert_same_gradient(ours, theirs)


def test_rows_are_evaluated_again_and_in_any_format() -> None:
    trainer = trainer_of("text", eval_dataset=rows_of("text"))
    expected = trainer.evaluate()["eval_kd"]
    assert trainer.evaluate({"again": rows_of("text")})["eval_again_kd"] == pytest.approx(expected, rel=1e-6)
    assert trainer.evaluate(rows_of("text").with_format("torch"))["eval_kd"] == pytest.approx(expected, rel=1e-6)
    assert trainer.evaluate(trainer.eval_dataset)["eval_kd"] == pytest.approx(expected, rel=1e-6)


def test_rows_are_not_read_by_halves() -> None:
    plain, first = {"prompt": "w1", "completion": " w3"}, {**_TEXT}
    for rows, named in (
        ([plain, first], r"Row 1 .* 'teacher_prompt'"),
        ([first, plain], r"Row 1 .* 'teacher_prompt'"),
    ):
        stream: Any = IterableDataset.from_generator(lambda rows=rows: iter(rows))
        with pytest.raises(ValueError, match=named):
            one_step(trainer_of("text", train_dataset=stream, per_device_train_batch_size=2))
    # Scored as the training rows are, of which all is.
    with pytest.raises(ValueError, match="completion_only_loss"):
        make_trainer(eval_dataset=rows_of("text"))
    ready = {"input_ids": [7, 8], "labels": [7, 8], "teacher_prompt": "w1"}
    with pytest.raises(ValueError, match="skip_prepare_dataset"):
        make_trainer(train_dataset=Dataset.from_list([ready]), dataset_kwargs={"skip_prepare_dataset": True})


def test_a_chain_is_not_begun_with_rows_that_its_training_refuses(tmp_path: Path) -> None:
    rows = Dataset.from_list([_CHAT] * 4)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = _MARKED
    with pytest.raises(ValueError, match="assistant_only_loss"):
        build_chain(
            tiny_model("llama"),
            [{"num_hidden_layers": 2}],
            dataset=rows,
            output_dir=tmp_path / "chain",
            args=make_config(),
            processing_class=tokenizer,
        )
    assert not (tmp_path / "chain").exists()


def test_a_stream_is_read_as_its_rows() -> None:
    rows = rows_of("text")
    stream: Any = IterableDataset.from_generator(lambda: iter(rows))
    (log, ours), (expected, theirs) = (one_step(trainer_of("text", train_dataset=each)) for each in (stream, rows))
    assert log["kd"] == pytest.approx(expected["kd"], rel=1e-5)
    assert_same_gradient(ours, theirs)


def test_a_completion_is_cut_into_tokens_as_for_the_student() -> None:
    """Where a prompt and a completion make one token ("w2w3") the teacher reads the student's tokens of the latter."""
    rows = Dataset.from_list([{"prompt": "", "teacher_prompt": "w1 w2", "completion": "w3 w4"}] * 4)
    trainer = trainer_of("text", train_dataset=rows)
    example = trainer.train_dataset[0]
    assert example[READ] == [str([7, 9, 10, 2]), "", ""]
    # What a row begins with is not predicted.
    assert example["labels"] == [9, 10, 2] and example[PLACES] == [-1, 2, 3]


_TEXT = {"prompt": "w1", "teacher_prompt": "w2 w1", "completion": " w3"}
_CHAT = {"messages": [user("w1"), assistant("w2")], "teacher_messages": [user("w3"), assistant("w2")]}


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("row", "how", "named"),
    [
        ({**_TEXT, "teacher_prompt": ""}, {}, r"Row 0 .* empty 'teacher_prompt'"),
        (
            {**_TEXT, "prompt": [user("w1")], "teacher_prompt": [], "completion": [assistant("w3")]},
            {},
            "Row 0 .* empty",
        ),
        ({**_TEXT, "teacher_prompt": None}, {}, r"Row 0 .* None in the column 'teacher_prompt'"),
        ({**_TEXT, "teacher_prompt": [user("w2")]}, {}, r"Row 0 .* list .* str"),
        (_TEXT, {"completion_only_loss": False}, "completion_only_loss"),
        (_TEXT, {"truncation_mode": "keep_end"}, "keep_start"),
        (_TEXT, {"packing": True, "packing_strategy": "wrapped"}, "packing_strategy"),
        ({"text": "w1", "teacher_prompt": "w2"}, {}, "'prompt' and 'completion'"),
        ({"input_ids": [7, 8], "teacher_prompt": "w2"}, {}, "input_ids"),
        ({**_CHAT, "teacher_prompt": [user("w2")]}, {}, r"teacher_messages.*Remove"),
        (_CHAT, {}, "assistant_only_loss"),
        (
            {**_CHAT, "teacher_messages": [user("w3"), assistant("w2 w4")]},
            {"assistant_only_loss": True},
            r"Row 0 .* scored on 2 tokens.* 3",
        ),
    ],
)
def test_what_is_refused(row: dict[str, Any], how: dict[str, Any], named: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = _MARKED
    with pytest.raises(ValueError, match=named):
        make_trainer(train_dataset=Dataset.from_list([row]), processing_class=tokenizer, **how)


@pytest.mark.parametrize("own", [False, True], ids=["another", "itself"])
def test_a_teacher_with_too_few_positions_is_refused(own: bool) -> None:
    adapter = lora(target_modules=["c_attn"], fan_in_fan_out=True)
    how: dict[str, Any] = {"self_distillation": True, "peft_config": adapter} if own else {}
    rows = Dataset.from_list([{**_TEXT, "teacher_prompt": words(40, 0)}])
    student, teacher = (tiny_model("gpt2", seed=seed, n_positions=32) for seed in (1, 2))
    with pytest.raises(ValueError, match=r"teacher reads .* 32"):
        make_trainer("gpt2", student=student, teacher=None if how else teacher, train_dataset=rows, **how)


def test_a_student_may_read_more_positions_than_its_teacher() -> None:
    """Rows that only the student reads are not measured by the teacher's."""
    row = {"prompt": words(40, 0), "teacher_prompt": "w1", "completion": " w3"}
    student, teacher = (tiny_model("gpt2", seed=1, n_positions=size) for size in (64, 32))
    log, _ = one_step(
        make_trainer(
            "gpt2", student=student, teacher=teacher, train_dataset=Dataset.from_list([row] * 4), max_length=64
        )
    )
    assert log["kd"] > 0


def test_the_bridge_refuses_it() -> None:
    config = make_config().to_dict()
    args = BridgeDistillConfig(OUTPUT, **{k: config[k] for k in ("use_cpu", "bf16", "report_to", "max_steps")})
    with pytest.raises(ValueError, match="teacher_prompt"):
        BridgeDistillTrainer(
            tiny_model("llama", seed=1),
            tiny_model("llama", seed=2),
            args,
            train_dataset=rows_of("text"),
            processing_class=tiny_tokenizer(),
            teacher_processing_class=tiny_tokenizer(),
        )
