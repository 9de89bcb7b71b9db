"""Each real token is counted once, and what SFT logs beside its loss is logged with SFT's values."""

from typing import Any

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from cbd_trl import BridgeDistillTrainer, DistillTrainer
from cbd_trl.cache import write_cache
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.trainers import bridge_runs
from tests.training import OUTPUT, make_config, make_trainer, text_rows

ROWS = text_rows((3, 9, 5, 12, 7, 20, 4, 6))
TOKENS = 66 + 8  # an end token for each row
BATCHES: dict[str, dict[str, Any]] = {
    "padded": {},
    "padded to 50": {"pad_to_multiple_of": 50},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    "packed": {"packing": True},
    "packed, padded to 50": {"packing": True, "pad_to_multiple_of": 50},
    "wrapped, padded to 50": {"packing": True, "packing_strategy": "wrapped", "pad_to_multiple_of": 50},
    "flat, padded to 50": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 50},
    "counted by transformers": {"packing": True, "pad_to_multiple_of": 50, "include_num_input_tokens_seen": "all"},
}


def _epoch(**how: Any) -> dict[str, Any]:
    return {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 3, "logging_steps": 2, **how}


@pytest.mark.parametrize("name", BATCHES)
def test_each_token_is_counted_once(name: str) -> None:
    trainer = make_trainer(train_dataset=ROWS, **_epoch(**BATCHES[name]))
    trainer.train()
    assert trainer.tokens_seen == trainer.state.log_history[-1]["num_tokens"] == TOKENS


def test_so_it_is_in_a_stream() -> None:
    how = {"packing": True, "pad_to_multiple_of": 50, "per_device_train_batch_size": 1, "max_length": 20}
    trainer = make_trainer(train_dataset=ROWS.to_iterable_dataset(), **_epoch(max_steps=4, **how))
    trainer.train()
    packs = [row["seq_lengths"] for row in trainer.train_dataset]
    assert trainer.tokens_seen == sum(map(sum, packs)) and len(packs) == 4


def test_a_teacher_beside_the_batch_is_not_counted(tmp_path: Any) -> None:
    write_cache(tiny_model("llama", seed=2), ROWS, tmp_path, processing_class=tiny_tokenizer(), args=make_config())
    how = _epoch(teacher_cache=str(tmp_path), packing=True, pad_to_multiple_of=50)
    cached = make_trainer(train_dataset=ROWS, **how)
    cached.train()
    assert cached.tokens_seen == TOKENS
    rows = Dataset.from_dict({"text": bridge_runs.texts(6)})
    tokenizer = bridge_runs.students_tokenizer()
    bridged = BridgeDistillTrainer(
        bridge_runs.student(),
        bridge_runs.teacher(),
        bridge_runs.make_bridge_config(**_epoch(packing=True, pad_to_multiple_of=50)),
        train_dataset=rows,
        processing_class=tokenizer,
        teacher_processing_class=bridge_runs.teachers_tokenizer(),
    )
    bridged.train()
    assert bridged.tokens_seen == sum(
        len(ids) for ids in tokenizer([f"{text}</s>" for text in rows["text"]])["input_ids"]
    )


def _failing(trainer: DistillTrainer, call: int) -> DistillTrainer:
    """Runs out of memory once, behind the so-manieth micro-batch."""
    step, calls = trainer.training_step, []

    def training_step(*args: Any, **kwargs: Any) -> Any:
        calls.append(step(*args, **kwargs))
        if len(calls) == call:
            raise RuntimeError("CUDA out of memory.")
        return calls[-1]

    trainer.training_step = training_step  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize("call", [1, 2, 4])
def test_nothing_is_left_of_an_attempt_that_was_given_up(call: int, tmp_path: Any) -> None:
    """transformers lowers a batch of 4 to 3; the weights of steps that were taken stay."""
    how = {"train_dataset": ROWS, "max_steps": 3, "train_sampling_strategy": "sequential", "learning_rate": 0.0}
    how |= {"gradient_accumulation_steps": 2, "output_dir": str(tmp_path)}
    found = _failing(make_trainer(**how, per_device_train_batch_size=4, auto_find_batch_size=True), call)
    found.train()
    right = make_trainer(**how, per_device_train_batch_size=3)
    right.train()
    for one, other in zip(found.state.log_history[:3], right.state.log_history[:3], strict=True):
        for term in ("loss", "kd", "ce", "teacher_ce", "entropy", "mean_token_accuracy", "num_tokens"):
            assert one[term] == pytest.approx(other[term], rel=1e-5), term


def test_the_count_goes_on_in_a_resumed_run_and_in_another_training(tmp_path: Any) -> None:
    how = {**_epoch(max_steps=3, logging_steps=10), "train_dataset": ROWS, "packing": True, "pad_to_multiple_of": 50}
    how |= {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2, "max_length": 20}
    how |= {"per_device_train_batch_size": 1}
    whole = make_trainer(**how)
    whole.train()
    again = make_trainer(**how)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.tokens_seen == whole.tokens_seen
    # No step was logged by itself: the last entry is of all three.
    assert whole.state.log_history[-1]["num_tokens"] == whole.tokens_seen
    once = whole.tokens_seen
    whole.train()
    assert whole.tokens_seen == 2 * once


@pytest.mark.parametrize("how", [{}, {"packing": True}], ids=["padded", "packed"])
def test_what_sft_logs_has_its_values(how: dict[str, Any]) -> None:
    fields = {"per_device_train_batch_size": 8, "eval_strategy": "steps", "eval_steps": 1, "max_length": 128, **how}
    ours = make_trainer(train_dataset=ROWS, eval_dataset=ROWS, learning_rate=0.0, **fields)
    step = {"max_steps": 1, "logging_steps": 1, "learning_rate": 0.0}
    theirs = SFTTrainer(
        ours.model,
        args=SFTConfig(OUTPUT, use_cpu=True, bf16=False, report_to="none", save_strategy="no", **step, **fields),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        processing_class=tiny_tokenizer(),
    )
    ours.train()
    theirs.train()
    one, other = (
        {k: v for entry in trainer.state.log_history for k, v in entry.items()} for trainer in (ours, theirs)
    )
    for prefix in ("", "eval_"):
        for name in ("entropy", "mean_token_accuracy", "num_tokens"):
            assert one[f"{prefix}{name}"] == pytest.approx(other[f"{prefix}{name}"], rel=1e-4), name
    assert one["mean_token_accuracy"] > 0


def test_a_trained_model_has_the_tag_of_trl() -> None:
    assert {"trl", "cbd_trl", "distill"} <= set(make_trainer().model.model_tags)
