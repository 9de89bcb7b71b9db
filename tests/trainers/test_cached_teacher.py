"""Training from a cache does what training from the teacher does."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cbd_trl import DistillConfig, DistillTrainer
from cbd_trl.cache import TeacherCache, write_cache
from cbd_trl.losses.divergence_table import DIVERGENCES
from cbd_trl.losses.divergences import get_divergence
from tests.tiny import FAMILIES, KINDS, own_names, tiny_model
from tests.tokenizer import WORDS, tiny_tokenizer
from tests.training import assert_same_gradient, make_config, make_trainer, one_step, text_rows

ROWS = text_rows((3, 9, 5, 12, 7, 20), seed=1)
VOCABULARY = 64
CACHES: dict[str, dict[str, Any]] = {
    "hidden": {"kind": "hidden"},
    "whole": {"k": VOCABULARY, "value_bits": 32},
    "top 5": {"k": 5, "value_bits": 32},
    "top 5 of 9": {"k": 9, "value_bits": 32},
}


def cached_trainer(folder: Path, family: str = "llama", **overrides: Any) -> DistillTrainer:
    depth = own_names(family, num_hidden_layers=2)
    arguments = {name: overrides.pop(name) for name in ("eval_dataset", "train_dataset") if name in overrides}
    return DistillTrainer(
        tiny_model(family, seed=1, **depth),
        args=make_config(teacher_cache=str(folder), **overrides),
        processing_class=tiny_tokenizer(),
        **{"train_dataset": ROWS, **arguments},
    )


def make_cache(folder: Path, family: str = "llama", **how: Any) -> Path:
    config = make_config(max_length=how.pop("max_length", 32))
    how = {"processing_class": tiny_tokenizer(), "args": config, **how}
    write_cache(tiny_model(family, seed=2), how.pop("rows", ROWS), folder, **how)
    return folder


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def trainers(family: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, DistillTrainer]:
    made = {"online": make_trainer(family, train_dataset=ROWS, per_device_train_batch_size=6)}
    for name, how in CACHES.items():
        folder = make_cache(tmp_path_factory.mktemp("cache"), family, **how)
        made[name] = cached_trainer(folder, family, per_device_train_batch_size=6)
    return made


def loss_and_gradient(
    trainer: DistillTrainer, divergence: str, masked: float, top_k: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of the first batch, some of its labels masked."""
    trainer._objective = dataclasses.replace(
        trainer._objective, divergence=get_divergence(divergence), top_k=top_k, temperature=1.0
    )
    trainer.model.train()
    trainer.model.zero_grad()
    batch = next(iter(trainer.get_train_dataloader()))
    order = batch["input_ids"].sum(-1).argsort()
    # The scored positions are those of other labels, and found anew where they are left out.
    batch = {name: values[order] for name, values in batch.items() if name != "scored"}
    hide = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(0)) < masked
    batch["labels"] = batch["labels"].masked_fill(hide, -100)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


# A divergence sees log-probabilities, whatever computed them: all of them with Llama, one in each kind of family.
_CASES = [
    pytest.param(
        family,
        divergence,
        masked,
        marks=()
        if family == "llama" or (family in KINDS and (divergence, masked) == ("forward_kl", 0.5))
        else pytest.mark.slow,
    )
    for family in FAMILIES
    for divergence in DIVERGENCES
    for masked in (0.0, 0.5, 1.0)
]


@pytest.mark.parametrize(("family", "divergence", "masked"), _CASES, indirect=["family"], scope="module")
def test_cached_is_dense(trainers: dict[str, DistillTrainer], divergence: str, masked: float) -> None:
    for name, top_k in (("hidden", None), ("whole", None), ("top 5", 5), ("top 5 of 9", 5)):
        expected, theirs = loss_and_gradient(trainers["online"], divergence, masked, top_k)
        loss, ours = loss_and_gradient(trainers[name], divergence, masked, None if name == "top 5" else top_k)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5), name
        if masked == 1.0:
            assert loss.item() == 0.0 and not any(g.any() for g in ours.values())
        else:
            assert_same_gradient(ours, theirs)


@pytest.mark.parametrize("how", [{}, {"packing": True}, {"padding_free": True, "max_length": None}], ids=str)
def test_a_run_over_epochs_shuffled_packed_and_truncated(how: dict, tmp_path: Path) -> None:
    run = {"per_device_train_batch_size": 1 if how.get("packing") else 3, "max_steps": 7, "max_length": 10, **how}
    run |= {"eval_dataset": ROWS, "max_grad_norm": 1.0}
    online = make_trainer(train_dataset=ROWS, **run)
    cached = cached_trainer(make_cache(tmp_path, kind="hidden", max_length=32), **run)
    for trainer in (online, cached):
        one_step(trainer)
    steps = [[log for log in run.state.log_history if "loss" in log] for run in (cached, online)]
    assert len(steps[0]) == 7 and steps[0][-1]["epoch"] > 1
    for ours, theirs in zip(*steps, strict=True):
        for name in ("loss", "kd", "ce", "teacher_ce", "num_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    metrics, expected = cached.evaluate(), online.evaluate()
    for name in ("eval_loss", "eval_kd", "eval_teacher_ce"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name


def test_sixteen_bits_and_a_temperature_are_close(tmp_path: Path) -> None:
    online, theirs = one_step(make_trainer(train_dataset=ROWS, temperature=2.0, top_k=8))
    cached, ours = one_step(cached_trainer(make_cache(tmp_path, k=8, temperature=2.0), temperature=2.0))
    assert cached["kd"] == pytest.approx(online["kd"], rel=1e-3)
    assert_same_gradient(ours, theirs, rtol=1e-3)


def test_draws_lead_where_the_teacher_does(tmp_path: Path) -> None:
    folder = make_cache(tmp_path, kind="sampled", k=400, value_bits=32)
    online, theirs = one_step(make_trainer(train_dataset=ROWS, ce_weight=0.0))
    cached, ours = one_step(cached_trainer(folder, ce_weight=0.0))
    assert cached["kd"] == pytest.approx(online["kd"], rel=0.05)
    assert cached["teacher_ce"] == pytest.approx(online["teacher_ce"], rel=1e-5)
    assert_same_gradient(ours, theirs, rtol=0.15)


def test_no_teacher_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_cache(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("a model loads"))
    trainer = cached_trainer(folder)
    assert trainer.teacher_model is None and one_step(trainer)[0]["kd"] > 0


def test_a_stream_is_looked_up_as_it_comes(tmp_path: Path) -> None:
    folder = make_cache(tmp_path, kind="hidden")
    rows = ROWS.to_iterable_dataset()
    online, theirs = one_step(make_trainer(train_dataset=rows))
    cached, ours = one_step(cached_trainer(folder, train_dataset=rows))
    assert cached["loss"] == pytest.approx(online["loss"], rel=1e-5)
    assert_same_gradient(ours, theirs)


def test_a_cache_that_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    folder = make_cache(tmp_path / "a", k=8)
    with pytest.raises(ValueError, match=r"6 of 6 rows are not in the teacher cache .*"):
        cached_trainer(folder, train_dataset=text_rows((4, 5, 6, 7, 8, 9), seed=9))
    with pytest.raises(ValueError, match=r"rows are not in the teacher cache"):
        cached_trainer(folder, eval_dataset=text_rows((4,), seed=9))
    with pytest.raises(ValueError, match=r"temperature=2.0, but the cache .* at temperature 1.0"):
        cached_trainer(folder, temperature=2.0)
    with pytest.raises(ValueError, match=r"top_k=9, but the cache .* holds 8 tokens at each position"):
        cached_trainer(folder, top_k=9)
    drawn = make_cache(tmp_path / "b", kind="sampled", k=8)
    for wrong in ({"divergence": "reverse_kl"}, {"top_k": 4}):
        with pytest.raises(ValueError, match="holds random draws, from which only the whole forward KL"):
            cached_trainer(drawn, **wrong)
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        DistillTrainer(
            tiny_model("llama"), args=make_config(teacher_cache=str(folder)), train_dataset=ROWS,
            processing_class=tiny_tokenizer(WORDS[::-1]),
        )  # fmt: skip
    with pytest.raises(ValueError, match="hidden_weight compares the layers of a teacher, which a teacher_cache"):
        DistillConfig("x", use_cpu=True, bf16=False, teacher_cache=str(folder), hidden_weight=1.0)
    assert TeacherCache.open(folder, verify=True).settings.k == 8
