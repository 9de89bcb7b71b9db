"""Text that a teacher wrote, without the teacher: plain cross-entropy, with the guarantees of the others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from cbd_trl import BridgeDistillTrainer
from cbd_trl.bridge.objectives.registry import get_objective, parse_objective
from tests.trainers.bridge_runs import (
    make_bridge_config,
    student,
    students_tokenizer,
    teacher,
    teachers_tokenizer,
    texts,
)
from tests.trainers.runs import lora
from tests.training import assert_same_gradient, one_step


def _seqkd(rows: Dataset | None = None, teacher_model: Any = None, **how: Any) -> BridgeDistillTrainer:
    names = ("teacher_processing_class", "block_map", "peft_config", "eval_dataset")
    arguments = {name: how.pop(name) for name in names if name in how}
    return BridgeDistillTrainer(
        student(),
        teacher_model,
        make_bridge_config(objective="seqkd", **how),
        Dataset.from_dict({"text": texts()}) if rows is None else rows,
        processing_class=students_tokenizer(),
        **arguments,
    )


def test_it_is_the_cross_entropy_of_every_token() -> None:
    model, tokenizer = student(), students_tokenizer()
    ids = [tokenizer(text + "</s>", return_tensors="pt")["input_ids"] for text in texts()]
    nats = [model(input_ids=row, labels=row).loss * (row.shape[1] - 1) for row in ids]
    loss = torch.stack(nats).sum() / sum(row.shape[1] - 1 for row in ids)
    loss.backward()
    logs, grads = one_step(_seqkd())
    assert logs["loss"] == pytest.approx(loss.item(), rel=1e-5) and logs["ce"] == pytest.approx(loss.item(), rel=1e-5)
    assert not {"kd", "teacher_ce", "unaligned", "hidden"} & logs.keys()
    assert_same_gradient(grads, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize(
    "how",
    [
        {"packing": True},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"loss_chunk_size": 3},
    ],
    ids=str,
)
def test_batching_changes_nothing(how: dict[str, Any]) -> None:
    (ours, our_grads), (theirs, their_grads) = one_step(_seqkd(**how)), one_step(_seqkd())
    assert_same_gradient(our_grads, their_grads)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_completions_of_chats_train_evaluate_and_leave_a_card(tmp_path: Path) -> None:
    rows = {
        "prompt": [[{"role": "user", "content": text}] for text in texts()],
        "completion": [[{"role": "assistant", "content": text[:9]}] for text in texts()],
    }
    trainer = _seqkd(
        Dataset.from_dict(rows), eval_dataset=Dataset.from_dict(rows), output_dir=str(tmp_path), save_strategy="steps",
        save_steps=1,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    assert before["eval_loss"] == pytest.approx(before["eval_ce"]) and before["eval_loss"] > 0
    trained = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert trained["loss"] == pytest.approx(before["eval_loss"], rel=1e-5)
    card = (tmp_path / "README.md").read_text()
    assert "| loss | 1 x cross-entropy |" in card and "the data is text that it wrote (SeqKD)" in card
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1").num_parameters() == student().num_parameters()
    )


def test_lora_and_bfloat16_train() -> None:
    logs, grads = one_step(_seqkd(peft_config=lora(), bf16=True))
    assert logs["loss"] == pytest.approx(one_step(_seqkd())[0]["loss"], rel=2e-2)
    assert grads and all("lora_" in name for name in grads)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "alm,seqkd"}, "objective='alm,seqkd': seqkd is .* others, whose ce_weight is its weight"),
        ({"objective": "seqkd=2"}, "objective='seqkd=2': .* cannot be mixed or weighted. Use it alone"),
        ({"objective": "seqdk"}, "Unknown objective 'seqdk': there are .*prefix, seqkd.* Did you mean 'seqkd'"),
        (
            {"teacher_model_name_or_path": "some"},
            "teacher_model_name_or_path='some' with objective='seqkd', .* not be used",
        ),
        (
            {"teacher_offload": True},
            "teacher_offload is about a teacher that is loaded, but with objective='seqkd' none",
        ),
        ({"kd_weight": 0.5}, "kd_weight=0.5 with objective='seqkd', whose loss is the cross-entropy alone"),
        ({"ce_weight": 0.0}, "ce_weight=0.0 with objective='seqkd', .* Leave ce_weight out"),
        ({"kd_schedule": "linear"}, "kd_schedule='linear' with objective='seqkd'"),
        ({"hidden_weight": 1.0}, "hidden_weight=1.0 with objective='seqkd'"),
        ({"temperature": 2.0}, "temperature=2.0 is an option of .* objective='seqkd': it would be ignored"),
        ({"divergence": "jsd"}, "divergence='jsd' is an option of .* objective='seqkd': it would be ignored"),
    ],
    ids=str,
)
def test_what_it_does_not_have_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_bridge_config(**{"objective": "seqkd", **fields})


def test_a_teacher_would_not_be_used() -> None:
    with pytest.raises(
        ValueError, match="teacher_model` of the trainer, and objective='seqkd' in the BridgeDistillConf"
    ):
        _seqkd(teacher_model=teacher())
    with pytest.raises(ValueError, match=r"teacher_processing_class was given with objective='seqkd'.*Leave it out"):
        _seqkd(teacher_processing_class=teachers_tokenizer())
    with pytest.raises(ValueError, match=r"block_map pairs .* what a teacher wrote"):
        _seqkd(block_map=[[0], [1]])
    with pytest.raises(ValueError, match="Unknown objective 'seqkd'"):
        get_objective("seqkd")
    assert parse_objective("seqkd") == {"seqkd": 1.0}


def test_the_others_need_a_teacher() -> None:
    message = "nor, in the BridgeDistillConfig, `teacher_model_name_or_path`. Give one of them"
    with pytest.raises(ValueError, match=message):
        BridgeDistillTrainer(student(), None, make_bridge_config(), Dataset.from_dict({"text": texts()}))
