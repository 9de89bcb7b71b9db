"""`DistillTrainer` with what users combine `SFTTrainer` with: the same loss and gradient as a plain run, where that is
the claim."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.trainers.runs import TERMS, Run, assert_same_run, lora
from tests.training import assert_same_gradient, make_trainer, one_step, text_rows

MANY = (3, 9, 5, 12, 2, 7, 4, 6)


@pytest.fixture(scope="module")
def plain() -> Run:
    return one_step(make_trainer(hidden_weight=1.0))


def stream(rows: Dataset) -> Any:
    return rows.to_iterable_dataset()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"padding_free": True, "max_length": None},
        {"packing": True, "max_length": 20},
        {"packing": True, "packing_strategy": "bfd_split", "max_length": 20},
    ],
)
def test_batching_does_not_change_the_step(how: dict[str, Any], streaming: bool, plain: Run) -> None:
    rows = stream(text_rows()) if streaming else text_rows()
    assert_same_run(one_step(make_trainer(train_dataset=rows, hidden_weight=1.0, **how)), plain)


def test_wrapped_packing_is_the_run_on_the_wrapped_rows() -> None:
    tokens = [id for text in text_rows()["text"] for id in tiny_tokenizer()(text + " </s>")["input_ids"]]
    by_hand = Dataset.from_dict({"input_ids": [tokens[i : i + 20] for i in range(0, len(tokens), 20)]})
    wrapped = make_trainer(hidden_weight=1.0, packing=True, packing_strategy="wrapped", max_length=20)
    assert_same_run(one_step(wrapped), one_step(make_trainer(train_dataset=by_hand, hidden_weight=1.0)))


def test_max_length_cuts_rows() -> None:
    tokens = [tiny_tokenizer()(text + " </s>")["input_ids"] for text in text_rows()["text"]]
    by_hand = Dataset.from_dict({"input_ids": [row[:5] for row in tokens]})
    cut = one_step(make_trainer(hidden_weight=1.0, max_length=5))
    assert_same_run(cut, one_step(make_trainer(train_dataset=by_hand, hidden_weight=1.0)))


def test_only_the_assistant_is_scored() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<' + message['role'] + '> ' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + ' </s> ' }}{% endgeneration %}{% else %}"
        "{{ message['content'] + ' </s> ' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
    )
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in (("w1 w2 w3", "w4 w5"), ("w6", "w7 w8 w9 w10"))
    ]
    how = {"processing_class": tokenizer, "hidden_weight": 1.0, "per_device_train_batch_size": 2}
    assistant = make_trainer(train_dataset=Dataset.from_dict({"messages": chats}), assistant_only_loss=True, **how)
    turns = Dataset.from_dict({"prompt": [chat[:1] for chat in chats], "completion": [chat[1:] for chat in chats]})
    everything = make_trainer(train_dataset=Dataset.from_dict({"messages": chats}), **how)
    run = one_step(assistant)
    assert_same_run(run, one_step(make_trainer(train_dataset=turns, **how)))
    assert one_step(everything)[0]["teacher_ce"] != pytest.approx(run[0]["teacher_ce"], rel=1e-3)


@pytest.mark.parametrize("packing", [False, True])
def test_completions_are_scored_alike_in_packs_and_streams(packing: bool) -> None:
    rows = Dataset.from_dict({"prompt": ["w1 w2 ", "w3 "], "completion": ["w4 w5", "w6 w7 w8"]})
    reference = one_step(make_trainer(train_dataset=rows, hidden_weight=1.0))
    for data in (rows, stream(rows)):
        assert_same_run(one_step(make_trainer(train_dataset=data, hidden_weight=1.0, packing=packing)), reference)


# TRL 1.16 calls it, and transformers 5.23 renamed it.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "how",
    [
        {"gradient_checkpointing": False},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing_kwargs": {"selective": True}},
    ],
)
def test_gradient_checkpointing(how: dict[str, Any], plain: Run) -> None:
    assert_same_run(one_step(make_trainer(hidden_weight=1.0, **how)), plain)


def test_mixed_precision_is_close_to_float32(plain: Run) -> None:
    logs, grads = one_step(make_trainer(hidden_weight=1.0, bf16=True))
    assert_same_gradient(grads, plain[1], rtol=0.05)
    for name in TERMS:
        assert logs[name] == pytest.approx(plain[0][name], rel=5e-3), name
        assert logs[name] != plain[0][name]
    assert {gradient.dtype for gradient in grads.values()} == {torch.float32}


def test_dropout_is_seeded_and_for_the_student_alone() -> None:
    def run(**how: Any) -> Run:
        student = tiny_model("gpt2", seed=1, n_layer=2, resid_pdrop=0.2, attn_pdrop=0.2)
        teacher = tiny_model("gpt2", seed=2, resid_pdrop=0.2, attn_pdrop=0.2)
        return one_step(make_trainer("gpt2", student=student, teacher=teacher, hidden_weight=1.0, **how))

    first = run()
    assert_same_run(run(), first)
    assert_same_run(run(gradient_checkpointing=False), first)
    without, _ = one_step(make_trainer("gpt2", hidden_weight=1.0))
    assert run(seed=43)[0]["kd"] != first[0]["kd"] != without["kd"]
    assert first[0]["teacher_ce"] == pytest.approx(without["teacher_ce"], rel=1e-6)


@pytest.mark.parametrize(
    "how",
    [
        {"packing": True, "max_length": 20},
        {"peft_config": lora()},
        {"kd_schedule": "linear", "ce_schedule": "cosine", "ce_weight_end": 1.0, "hidden_schedule": "linear"},
        {"train_dataset": stream(text_rows(MANY))},
    ],
)
def test_resuming_is_an_unbroken_run(how: dict[str, Any], tmp_path: Path) -> None:
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "hidden_weight": 1.0, "max_length": 32}
    arguments |= {"per_device_train_batch_size": 1, "train_dataset": text_rows(MANY, seed=3), **how}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **arguments)
    whole.train()
    resumed = make_trainer(output_dir=str(tmp_path / "resumed"), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    ours, theirs = (
        [{name: value for name, value in entry.items() if "runtime" not in name} for entry in t.state.log_history]
        for t in (resumed, whole)
    )
    assert [entry for entry in ours if "loss" in entry] == [entry for entry in theirs if "loss" in entry]
    for (name, one), other in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("how", [{}, {"packing": True, "max_length": 20}])
def test_metrics_see_the_logits_of_the_students_own_forward(how: dict[str, Any]) -> None:
    seen = []

    def best(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append((logits, labels))
        return logits.argmax(-1)

    trainer = make_trainer(eval_dataset=text_rows(), compute_metrics=lambda p: {"shape": p.predictions.ndim}, **how)
    trainer.preprocess_logits_for_metrics = best
    assert trainer.evaluate()["eval_shape"] == 2
    with torch.no_grad():
        for (logits, labels), batch in zip(seen, trainer.get_eval_dataloader(), strict=True):
            assert torch.equal(labels, batch.pop("labels"))
            batch.pop("row_lengths", None)
            own = trainer.model(**batch).logits
            scored = (labels != -100)[..., None]
            assert (logits - own).masked_fill(~scored, 0).abs().max() <= 1e-5 * own.std()


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(
        output_dir=str(tmp_path), eval_dataset=text_rows(seed=9), max_steps=6, learning_rate=0.2,
        lr_scheduler_type="constant", load_best_model_at_end=True, save_total_limit=2, **every,
    )  # fmt: skip
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(losses) == trainer.state.best_metric < losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *made])
        return result


@pytest.mark.parametrize("how", [{}, {"divergence": "jsd", "top_k": 8}, {"temperature": 2.0, "peft_config": lora()}])
def test_no_tensor_of_all_logits_is_ever_made(how: dict[str, Any]) -> None:
    vocabulary, tokens, chunk = 32_000, 8 * 65, 16
    student, teacher = (
        tiny_model("llama", seed=seed, num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=2,
                   num_key_value_heads=1, head_dim=4, vocab_size=vocabulary)
        for seed in (1, 2)
    )  # fmt: skip
    trainer = make_trainer(
        student=student, teacher=teacher, train_dataset=text_rows([64] * 8), eval_dataset=text_rows([64] * 8),
        per_device_train_batch_size=8, max_length=65, hidden_weight=1.0, loss_chunk_size=chunk, optim="sgd", **how,
    )  # fmt: skip
    with _Largest() as seen:
        trainer.train()
        trainer.evaluate()
    assert chunk * vocabulary <= seen.elements <= 1.1 * chunk * vocabulary < 0.05 * tokens * vocabulary
