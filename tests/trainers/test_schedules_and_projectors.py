"""Weights that change over the run, and projectors that are trained along and never saved in the student."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from cbd_trl import DistillTrainer
from cbd_trl.losses.hidden import HIDDEN_LOSSES
from cbd_trl.trainers.hidden_states import FILE, NAME
from tests.tiny import by_kind, own_names, tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.training import assert_same_gradient, make_config, make_trainer, one_step, text_rows

FADING = {
    **{"kd_weight": 1.0, "kd_schedule": "linear", "kd_weight_end": 0.2},
    **{"ce_weight": 0.5, "ce_schedule": "cosine", "ce_weight_end": 2.0},
    **{"hidden_weight": 1.0, "hidden_schedule": "linear"},
}
EIGHT = text_rows((3, 9, 5, 12, 2, 7, 4, 6))


def history(trainer: DistillTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def narrow(family: str = "llama") -> Any:
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    return tiny_model(family, seed=1, **own_names(family, **shape))


def projecting(family: str = "llama", **overrides: Any) -> DistillTrainer:
    """A student of half the teacher's width, and projectors between them."""
    fields = {"hidden_weight": 1.0, "hidden_projector": True, **overrides}
    return make_trainer(family, student=fields.pop("student", None) or narrow(family), **fields)


def saved_keys(folder: Path) -> set[str]:
    keys: set[str] = set()
    for file in folder.glob("*model*.safetensors"):
        with safe_open(file, "pt") as tensors:
            keys.update(tensors.keys())
    assert keys
    return keys


def assert_equal_parameters(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, ours), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("how", [{"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 2}], ids=str)
def test_the_log_follows_the_schedules_and_explains_the_loss(how: dict) -> None:
    trainer = make_trainer(**FADING, **how, train_dataset=EIGHT)
    trainer.train()
    entries = history(trainer)
    assert len(entries) == 4
    for step, entry in enumerate(entries):
        progress = step / 4
        weights = {
            "kd": 1.0 - 0.8 * progress,
            "ce": 0.5 + 1.5 * (1 - math.cos(math.pi * progress)) / 2,
            "hidden": 1.0 - progress,
        }
        for term, weight in weights.items():
            assert entry[f"{term}_weight"] == pytest.approx(weight), (step, term)
        assert entry["loss"] == pytest.approx(sum(weights[term] * entry[term] for term in weights), rel=1e-5)


def test_constant_weights_are_not_logged() -> None:
    logs, _ = one_step(make_trainer(ce_schedule="linear"))
    assert logs["ce_weight"] == 0.5 and "kd_weight" not in logs and "hidden_weight" not in logs


def test_a_step_has_the_gradient_of_its_weights() -> None:
    _, scheduled = one_step(make_trainer(**FADING, max_steps=4, learning_rate=0.0))
    weights = {"kd_weight": 0.4, "ce_weight": 0.5 + 0.75 * (1 - math.cos(0.75 * math.pi)), "hidden_weight": 0.25}
    _, constant = one_step(make_trainer(**weights))
    assert_same_gradient(scheduled, constant)


def test_all_micro_batches_of_a_step_have_its_weights() -> None:
    runs = []
    for steps in (1, 4):
        how = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps, "max_steps": 2}
        runs.append(one_step(make_trainer(**FADING, **how, learning_rate=0.0)))
    assert_same_gradient(runs[1][1], runs[0][1])


def test_evaluation_has_the_weights_of_its_time() -> None:
    trainer = make_trainer(**FADING, max_steps=4, eval_dataset=text_rows())
    before, _, after = trainer.evaluate(), trainer.train(), trainer.evaluate()
    for metrics, (kd, ce, hidden) in ((before, (1.0, 0.5, 1.0)), (after, (0.2, 2.0, 0.0))):
        total = kd * metrics["eval_kd"] + ce * metrics["eval_ce"] + hidden * metrics["eval_hidden"]
        assert metrics["eval_loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("term", ["kd", "hidden"])
def test_a_term_may_start_at_0(term: str) -> None:
    off = {"kd_weight": 0.0, "ce_weight": 0.0, "hidden_weight": 0.0}
    trainer = make_trainer(**off, **{f"{term}_schedule": "linear", f"{term}_weight_end": 1.0}, max_steps=3)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    first, second, third = history(trainer)
    assert first["loss"] == 0.0 and first["grad_norm"] == 0.0 and first[term] > 0
    assert second["loss"] == pytest.approx(second[term] / 3, rel=1e-5)
    assert second[term] == pytest.approx(first[term], rel=1e-5) and third[term] < 0.99 * second[term]
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize("projector", [False, True])
def test_a_resumed_run_is_the_unbroken_one(projector: bool, tmp_path: Path) -> None:
    def run(name: str) -> DistillTrainer:
        how = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
        fields = {**FADING, **how, "output_dir": str(tmp_path / name), "train_dataset": EIGHT}
        return projecting(**fields) if projector else make_trainer(**fields)

    whole, resumed = run("whole"), run("resumed")
    whole.train()
    assert (tmp_path / "whole" / "checkpoint-2" / FILE).exists() is projector
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal_parameters(resumed.model, whole.model)
    if projector:
        assert resumed.projectors is not None and whole.projectors is not None
        assert_equal_parameters(resumed.projectors, whole.projectors)
    assert len(history(resumed)) == 4
    for ours, theirs in zip(history(resumed), history(whole), strict=True):
        assert {**ours, "epoch": 0} == {**theirs, "epoch": 0}


def _by_hand(trainer: DistillTrainer, loss: str) -> tuple[Tensor, list[Tensor]]:
    # Layer by layer from `hidden_states`; the last is taken before the final norm, as the trainer's hooks do.
    student, teacher, weights = trainer.model, trainer.teacher_model, []
    assert trainer.projectors is not None
    distances = []
    rows = [trainer.processing_class(row["text"] + "</s>", return_tensors="pt")["input_ids"] for row in text_rows()]
    for index, block_end in ((0, 1), (1, 3)):
        weight = trainer.projectors.layers[index].weight.detach().clone().requires_grad_()
        weights.append(weight)
        per_token = []
        for ids in rows:
            states = []
            for model, layer in ((student, index), (teacher, block_end)):
                kept: list[Tensor] = []
                hook = model.model.layers[layer].register_forward_hook(lambda m, a, out, kept=kept: kept.append(out))
                with torch.no_grad():
                    model(input_ids=ids)
                hook.remove()
                states.append(kept[0][0, :-1])
            per_token.append(HIDDEN_LOSSES[loss](states[0] @ weight.T, states[1]))
        distances.append(torch.cat(per_token).mean())
    total = torch.stack(distances).mean()
    return total, list(torch.autograd.grad(total, weights))


@pytest.mark.parametrize("loss", list(HIDDEN_LOSSES))
def test_projectors_are_trained_with_the_gradient_computed_by_hand(loss: str) -> None:
    trainer = projecting(hidden_loss=loss, block_map=[[0, 1], [2, 3]])
    assert trainer.projectors is not None
    before = [p.detach().clone() for p in trainer.projectors.parameters()]
    expected, gradients = _by_hand(trainer, loss)
    logs, grads = one_step(trainer)
    assert logs["hidden"] == pytest.approx(expected.item(), rel=1e-5)
    ours = {name: gradient for name, gradient in grads.items() if NAME in name}
    assert_same_gradient(ours, {f"{NAME}.layers.{i}.weight": g for i, g in enumerate(gradients)})
    assert not any(torch.equal(p, old) for p, old in zip(trainer.projectors.parameters(), before, strict=True))


@pytest.mark.parametrize("family", by_kind())
def test_projectors_bring_models_of_unequal_width_together(family: str) -> None:
    trainer = projecting(family, max_steps=12, kd_weight=0.0, ce_weight=0.0, learning_rate=2e-2)
    trainer.train()
    entries = history(trainer)
    assert entries[-1]["hidden"] < 0.7 * entries[0]["hidden"]
    assert not hasattr(trainer.model, NAME)


class _SaveWhileTraining(TrainerCallback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.save_pretrained(self.folder)


@pytest.mark.parametrize("lora", [False, True])
def test_no_saved_student_has_projectors(lora: bool, tmp_path: Path) -> None:
    adapter = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="gaussian", task_type="CAUSAL_LM")
    how = {"output_dir": str(tmp_path / "run"), "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    plain = make_trainer(student=narrow(), **how, **({"peft_config": adapter} if lora else {}))
    plain.save_model(str(tmp_path / "plain"))
    trainer = projecting(**how, **({"peft_config": adapter} if lora else {}))
    trainer.add_callback(_SaveWhileTraining(tmp_path / "callback"))
    _, grads = one_step(trainer)
    assert sum(NAME in name for name in grads) == 2
    trainer.save_model(str(tmp_path / "after"))
    keys = saved_keys(tmp_path / "plain")
    assert not any(NAME in key for key in keys)
    for folder in ("run/checkpoint-2", "callback", "after"):
        assert saved_keys(tmp_path / folder) == keys, folder
    assert (tmp_path / "run" / "checkpoint-2" / FILE).is_file() and not (tmp_path / "after" / FILE).exists()
    if not lora:
        _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-2", output_loading_info=True)
        assert not report["unexpected_keys"] and not report["missing_keys"]


def test_evaluation_works_outside_training_and_sees_the_trained_projectors() -> None:
    trainer = projecting(eval_dataset=text_rows(), max_steps=3)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert history(trainer)[0]["hidden"] == pytest.approx(before["eval_hidden"], rel=1e-5)
    assert after["eval_hidden"] < 0.95 * before["eval_hidden"]
    assert not hasattr(trainer.model, NAME) and not any(NAME in key for key in trainer.model.state_dict())


def test_training_may_go_on_with_the_projectors_it_had() -> None:
    trainer = projecting(max_steps=3, learning_rate=2e-2)
    trainer.train()
    reached = history(trainer)[-1]["hidden"]
    trainer.train()
    assert history(trainer)[-3]["hidden"] < reached


def test_they_are_taken_off_when_training_fails() -> None:
    class Fail(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyError("stop")

    trainer = projecting()
    trainer.add_callback(Fail())
    with pytest.raises(KeyError, match="stop"):
        trainer.train()
    assert not hasattr(trainer.model, NAME)


def test_the_best_checkpoint_brings_its_projectors(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_hidden", "greater_is_better": True}
    how = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    trainer = projecting(output_dir=str(tmp_path), eval_dataset=text_rows(), **best, **how)
    trainer.train()
    # The greatest distance is that of the first checkpoint: not what training ended with.
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert trainer.projectors is not None
    with safe_open(tmp_path / "checkpoint-1" / FILE, "pt") as saved:
        for name, parameter in trainer.projectors.named_parameters():
            assert torch.equal(parameter, saved.get_tensor(name))
    assert trainer.evaluate()["eval_hidden"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_a_checkpoint_without_projectors_is_refused(tmp_path: Path) -> None:
    how = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "output_dir": str(tmp_path)}
    make_trainer(student=narrow(), **how).train()
    with pytest.raises(ValueError, match=f"has no {FILE}, but this run learns projectors"):
        projecting(**how).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_seed_decides_how_projectors_start() -> None:
    starts = [projecting(seed=seed).projectors for seed in (1, 1, 2)]
    one, same, other = (next(iter(start.parameters())) for start in starts if start is not None)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_an_optimizer_that_does_not_hold_the_projectors_is_refused() -> None:
    student = narrow()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"optimizers=\(SGD, \.\.\.\): .* Pass `optimizer_cls_and_kwargs="):
        DistillTrainer(
            student, tiny_model("llama", seed=2), make_config(hidden_weight=1.0, hidden_projector=True),
            train_dataset=text_rows(), processing_class=tiny_tokenizer(), optimizers=(optimizer, None),
        )  # fmt: skip
    trainer = projecting()
    trainer.create_optimizer()
    with pytest.raises(ValueError, match="an optimizer already, which does not hold the projectors"):
        trainer.train()
    assert not hasattr(trainer.model, NAME)
    trainer.optimizer = None
    trainer.train()


def test_a_hidden_term_without_a_gradient_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(hidden_weight=1.0, eval_dataset=text_rows())
    distance = trainer._pairs.distance

    def cut(*args: Any) -> Tensor | None:
        found = distance(*args)
        return None if found is None else found.detach()

    monkeypatch.setattr(trainer._pairs, "distance", cut)
    trainer.evaluate()
    with pytest.raises(RuntimeError, match=r"weight 1 but no gradient, .* gradient_checkpointing_kwargs=\{'use_"):
        trainer.train()
