"""Chats reach the teacher in its own template, whatever happens to the rows on the way."""

import json
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from cbd_trl import BridgeDistillTrainer
from cbd_trl.bridge.alignment import NOWHERE
from cbd_trl.bridge.objectives.inputs import Places
from tests.bridge.alignment_helpers import spelled
from tests.bridge.tokenizers_of_kinds import corpus, make_tokenizer
from tests.trainers.bridge_runs import TEMPLATE, make_bridge, students_tokenizer, teachers_tokenizer
from tests.training import assert_same_gradient, one_step

OWN = (
    "{% if tools %}tools: {{ tools | length }}\n{% endif %}{% if mood %}{{ mood }}: {% endif %}"
    "{% for message in messages %}{{ message['role'] }} says {{ message['content'] }}</s>\n{% endfor %}"
)
WORDS = corpus(texts=1)[0].split()
CHATS = [
    [
        {"role": "user", "content": " ".join(WORDS[i : i + 2])},
        {"role": "assistant", "content": " ".join(WORDS[i + 3 : i + 4 + i // 2])},
    ]
    for i in range(6)
]


def _teachers(template: str | None = OWN) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer("byte_level", 420, seed=1)
    tokenizer.chat_template = template
    return tokenizer


def _trainer(template: str | None = OWN, **how: Any) -> BridgeDistillTrainer:
    how = {"train_dataset": Dataset.from_dict({"messages": CHATS}), "per_device_train_batch_size": 6, **how}
    return make_bridge(teacher_processing_class=_teachers(template), **how)


def _batch(trainer: BridgeDistillTrainer) -> dict[str, Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def _read(batch: dict[str, Tensor]) -> list[list[int]]:
    rows = zip(batch["teacher_ids"], batch["teacher_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


def _rendered(chats: list[list[dict[str, str]]] = CHATS, **template: Any) -> list[list[int]]:
    return sorted(_teachers().apply_chat_template(chat, **template)["input_ids"] for chat in chats)


def _groups(places: Places, ids: Tensor) -> Tensor:
    """The group of each token of a batch."""
    group = torch.full_like(ids, NOWHERE).flatten()
    group[places.scored.index_N + 1] = places.group_N
    return group.view_as(ids)


def _assert_groups_are_the_same_bytes(batch: dict[str, Any]) -> None:
    plan = batch["teacher_plan"]
    sides = [
        (students_tokenizer(), batch["input_ids"], _groups(plan.student, batch["input_ids"])),
        (_teachers(), batch["teacher_ids"], _groups(plan.teacher, batch["teacher_ids"])),
    ]
    groups = plan.teacher.groups
    found = []
    for tokenizer, ids, group in sides:
        texts = [b""] * groups
        for token, number in zip(spelled(tokenizer, ids.flatten().tolist()), group.flatten().tolist(), strict=True):
            if number != NOWHERE:
                texts[number] += token
        found.append(texts)
    assert found[0] == found[1] and groups > len(CHATS)


PACKED: dict[str, Any] = {"packing": True, "max_length": 96, "per_device_train_batch_size": 8}
HOW = [{}, {"padding_free": True, "max_length": None}, PACKED, {**PACKED, "packing_strategy": "bfd_split"}]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_the_teacher_reads_its_own_template(how: dict[str, Any]) -> None:
    batch = _batch(_trainer(**how))
    assert sorted(_read(batch)) == _rendered()
    _assert_groups_are_the_same_bytes(batch)
    labels, group = batch["labels"], _groups(batch["teacher_plan"].student, batch["input_ids"])
    unaligned = (labels[:, 1:] != -100) & (group[:, 1:] == NOWHERE)
    # The roles are written differently: "<user>" is a mark of the student's.
    marks = torch.isin(batch["input_ids"][:, 1:], torch.tensor(students_tokenizer().convert_tokens_to_ids(["<user>"])))
    assert unaligned.any() and not (marks & ~unaligned & (labels[:, 1:] != -100)).any()


@pytest.mark.parametrize("how", HOW[1:3], ids=str)
def test_batching_changes_nothing(how: dict[str, Any]) -> None:
    (ours, our_grads), (theirs, their_grads) = one_step(_trainer(**how)), one_step(_trainer())
    assert_same_gradient(our_grads, their_grads)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5) and ours["unaligned"] == theirs["unaligned"] > 0


def test_equal_templates_change_nothing() -> None:
    (ours, our_grads), (theirs, their_grads) = one_step(_trainer(TEMPLATE)), one_step(_trainer(None))
    assert_same_gradient(our_grads, their_grads)
    for name in ("loss", "kd", "teacher_ce", "unaligned"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert one_step(_trainer())[0]["kd"] != pytest.approx(ours["kd"], rel=1e-3)


def test_what_cuts_a_chat_lets_the_teacher_read_the_students_text() -> None:
    lengths = sorted(len(students_tokenizer().apply_chat_template(chat)["input_ids"]) for chat in CHATS)
    limit = lengths[2]
    assert limit < lengths[3]
    assert sorted(_read(_batch(_trainer(max_length=limit)))) == _rendered()
    with pytest.warns(FutureWarning, match="keep_end"):
        end = _trainer(max_length=limit, truncation_mode="keep_end")
    assert sum(row in _rendered() for row in _read(_batch(end))) == 3
    wrapped = _trainer(packing=True, packing_strategy="wrapped", max_length=30, per_device_train_batch_size=16)
    plain = _trainer(None, packing=True, packing_strategy="wrapped", max_length=30, per_device_train_batch_size=16)
    ours, theirs = _batch(wrapped), _batch(plain)
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    same = [one == other for one, other in zip(_read(ours), _read(theirs), strict=True)]
    assert sum(same) > 0
    assert all(row in _rendered() for row, kept in zip(_read(ours), same, strict=True) if not kept)


@pytest.mark.parametrize("packing", [False, True])
def test_prompts_and_completions_tools_and_template_arguments_reach_both_templates(packing: bool) -> None:
    tools = [{"type": "function", "function": {"name": "lo", "description": "ba", "parameters": {}}}]
    rows = {
        "prompt": [chat[:1] for chat in CHATS],
        "completion": [chat[1:] for chat in CHATS],
        "tools": [json.dumps(tools)] * len(CHATS),
        "chat_template_kwargs": [{"mood": "ri"}] * len(CHATS),
    }
    batch = _batch(_trainer(train_dataset=Dataset.from_dict(rows), packing=packing))
    expected = _rendered(tools=tools, mood="ri")
    assert sorted(_read(batch)) == expected != _rendered()
    assert _teachers().decode(expected[0]).startswith("tools: 1\nri: user says")
    prompts = batch["labels"] == -100
    assert (_groups(batch["teacher_plan"].student, batch["input_ids"])[prompts] == NOWHERE).all()


def test_streams_and_conversations_are_read_alike() -> None:
    def stream() -> Any:
        for chat in CHATS:
            yield {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in chat]}

    for packing in (False, True):
        batch = _batch(_trainer(train_dataset=IterableDataset.from_generator(stream), packing=packing))
        assert sorted(_read(batch)) == _rendered()


def test_an_evaluation_set_is_read_alike() -> None:
    rows = Dataset.from_dict({"messages": CHATS})
    trainer = _trainer(eval_dataset=rows)
    runs = [trainer.evaluate(), trainer.evaluate(rows)]
    trained, _ = one_step(trainer)
    for run in runs:
        for name in ("loss", "kd", "unaligned"):
            assert run[f"eval_{name}"] == pytest.approx(trained[name], rel=1e-5), name


def test_the_data_is_what_trl_makes_of_it() -> None:
    for how in ({"packing": True}, {"packing": True, "shuffle_dataset": True}, {"shuffle_dataset": True}):
        ours = _trainer(max_length=40, **how)
        theirs = super(BridgeDistillTrainer, ours)._prepare_dataset(
            Dataset.from_dict({"messages": CHATS}), ours.processing_class, ours.args, ours.args.packing, None, "train"
        )
        assert (
            ours.train_dataset["input_ids"] == theirs["input_ids"] and ours.train_dataset["labels"] == theirs["labels"]
        )
    assert teachers_tokenizer().chat_template is None
