"""LoRA and QLoRA students, and quantized teachers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cbd_trl import DistillTrainer
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.trainers.runs import TERMS, Run, assert_same_run, lora
from tests.training import assert_same_gradient, make_config, make_trainer, one_step, text_rows


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_get_the_gradient_of_the_weights_they_adapt(tied: bool, rank_stabilised: bool) -> None:
    def student() -> Any:
        return tiny_model("llama", seed=1, num_hidden_layers=2, tie_word_embeddings=tied)

    full_logs, full = one_step(make_trainer(student=student(), hidden_weight=1.0))
    for how in ({}, {"packing": True, "max_length": 20}, {"gradient_checkpointing": False}):
        adapter = lora(use_rslora=rank_stabilised)
        trainer = make_trainer(student=student(), peft_config=adapter, hidden_weight=1.0, **how)
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_A" in name}
        logs, grads = one_step(trainer)
        scale = adapter.lora_alpha / (math.sqrt(adapter.r) if rank_stabilised else adapter.r)
        expected = {}
        for name, gradient in grads.items():
            if "lora_A" in name:  # B is 0 at the start
                expected[name] = torch.zeros_like(gradient)
                continue
            weight = name.removeprefix("base_model.model.").replace(".lora_B.default", "")
            expected[name] = scale * full[weight] @ weights[name.replace("lora_B", "lora_A")].T
        assert_same_run((logs, grads), (full_logs, expected))


def test_a_head_beside_the_adapter_is_trained() -> None:
    full_logs, full = one_step(make_trainer(hidden_weight=1.0))
    logs, grads = one_step(make_trainer(peft_config=lora(modules_to_save=["lm_head"]), hidden_weight=1.0))
    head = "base_model.model.lm_head.modules_to_save.default.weight"
    assert_same_run((logs, {"head": grads[head]}), (full_logs, {"head": full["lm_head.weight"]}))


def test_a_head_beside_the_adapter_is_not_the_teachers() -> None:
    trainer = DistillTrainer(
        tiny_model("llama", seed=1, num_hidden_layers=2),
        args=make_config(self_distillation=True, max_steps=4),
        train_dataset=text_rows(),
        processing_class=tiny_tokenizer(),
        peft_config=lora(modules_to_save=["lm_head"]),
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "kd" in entry]
    assert history[0]["kd"] == 0.0 < history[-1]["kd"]
    assert history[-1]["teacher_ce"] == pytest.approx(history[0]["teacher_ce"], rel=1e-6)


def test_trained_tokens_of_a_tied_head_are_trained_at_both_ends() -> None:
    student = tiny_model("llama", seed=1, num_hidden_layers=2, tie_word_embeddings=True)
    trainer = make_trainer(student=student, peft_config=lora(trainable_token_indices={"embed_tokens": [7, 8, 9]}))
    model: Any = trainer.model
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "trainable_tokens_delta" in n).mul_(3.0)
    rows = [trainer.processing_class(text + "</s>", return_tensors="pt")["input_ids"] for text in text_rows()["text"]]
    count = sum(ids.shape[1] - 1 for ids in rows)
    loss = torch.zeros(())
    for ids in rows:
        ours, theirs = (
            m.forward(input_ids=ids).logits[0, :-1].log_softmax(-1) for m in (model, trainer.teacher_model)
        )
        kd, ce = (theirs.exp() * (theirs - ours)).sum(), -ours.gather(1, ids[0, 1:, None]).sum()
        loss = loss + (kd + 0.5 * ce) / count
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logs, grads = one_step(trainer)
    assert logs["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradient(grads, expected)


_NF4 = {
    "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
}  # fmt: skip
_WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def saved(folder: Path, seed: int, layers: int) -> str:
    tiny_model("llama", seed=seed, num_hidden_layers=layers, **_WIDE).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("self_distillation", [False, True])
def test_a_student_of_four_bits_is_trained_through_and_after_evaluations(
    self_distillation: bool, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    args = make_config(
        model_init_kwargs={"dtype": "float32"}, self_distillation=self_distillation, max_steps=4,
        eval_strategy="steps", eval_steps=1, hidden_weight=0.0 if self_distillation else 1.0,
    )  # fmt: skip
    trainer = DistillTrainer(
        saved(tmp_path / "student", 1, 2),
        None if self_distillation else saved(tmp_path / "teacher", 2, 4),
        args,
        train_dataset=text_rows(),
        eval_dataset=text_rows(),
        processing_class=tiny_tokenizer(),
        peft_config=lora(target_modules="all-linear"),
        quantization_config=BitsAndBytesConfig(**_NF4),
    )
    first = trainer.evaluate()
    _, grads = one_step(trainer)
    assert len(grads) == 28 and all(gradient.isfinite().all() for gradient in grads.values())
    assert all(gradient.abs().max() > 0 for name, gradient in grads.items() if "lora_B" in name)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    # The adapters are bfloat16 in training, as TRL has it.
    assert history[0]["ce"] == pytest.approx(first["eval_ce"], rel=1e-3)
    assert history[-1]["ce"] < 0.9 * history[0]["ce"]
    assert history[-1]["teacher_ce"] == pytest.approx(history[0]["teacher_ce"], rel=1e-4)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_teacher_of_four_bits_says_what_its_rounded_weights_say(as_json: bool, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    path = saved(tmp_path, 2, 4)

    def run(teacher: Any, **how: Any) -> Run:
        student = tiny_model("llama", seed=1, num_hidden_layers=2, **_WIDE)
        return one_step(make_trainer(student=student, teacher=teacher, hidden_weight=1.0, **how))

    quantized = {"quantization_config": _NF4 if as_json else BitsAndBytesConfig(**_NF4)}
    logs, grads = run(path, teacher_model_init_kwargs=json.dumps(quantized) if as_json else quantized)
    rounded = AutoModelForCausalLM.from_pretrained(path, quantization_config=BitsAndBytesConfig(**_NF4)).dequantize()
    expected, exact = run(rounded)
    # Some CPUs run it in bfloat16.
    assert_same_gradient(grads, exact, rtol=0.02)
    for name in TERMS:
        assert logs[name] == pytest.approx(expected[name], rel=5e-3), name
    assert run(path)[0]["teacher_ce"] != pytest.approx(logs["teacher_ce"], rel=1e-3)
