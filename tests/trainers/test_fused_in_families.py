"""The trainer's loss, which never holds all logits, beside the same loss from the models' own logits."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from cbd_trl import DistillTrainer
from cbd_trl.trainers.hidden_states import NAME
from tests.tiny import by_kind, own_names, tiny_model
from tests.trainers.dense import DIVERGENCES, dense_terms, gradients
from tests.training import assert_same_gradient, make_trainer, one_step

_GENERATOR = random.Random(0)
IDS = [[_GENERATOR.randrange(6, 60) for _ in range(length)] for length in (4, 10, 6, 12)]
# 1 where a token is scored: everything, every other token.
MASKS = {
    "0%": [[1] * len(row) for row in IDS],
    "50%": [[(i + len(row)) % 2 for i in range(len(row))] for row in IDS],
}


def labels_of(mask: Sequence[Sequence[int]]) -> list[list[int]]:
    return [
        [token if kept else -100 for token, kept in zip(*pair, strict=True)] for pair in zip(IDS, mask, strict=True)
    ]


def student_of(family: str) -> Any:
    return tiny_model(family, seed=1, **own_names(family, num_hidden_layers=2))


def trainer_on(mask: Sequence[Sequence[int]], family: str, **fields: Any) -> DistillTrainer:
    rows = Dataset.from_dict({"input_ids": IDS, "completion_mask": mask})
    return make_trainer(family, train_dataset=rows, completion_only_loss=True, loss_chunk_size=7, **fields)


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("family", by_kind())
def test_fused_is_dense(family: str, divergence: str, masked: str) -> None:
    mask, by_hand = MASKS[masked], student_of(family)
    terms = dense_terms(by_hand, [tiny_model(family, seed=2)], IDS, labels_of(mask), DIVERGENCES[divergence])
    loss = terms["kd"] + 0.5 * terms["ce"]
    loss.backward()
    trainer = trainer_on(mask, family, divergence=divergence)
    assert list(trainer.train_dataset["labels"]) == labels_of(mask)
    logs, grads = one_step(trainer)
    assert logs["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, value in terms.items():
        assert logs[name] == pytest.approx(value.item(), rel=1e-5), name
    assert_same_gradient(grads, gradients(by_hand))


def _batch(trainer: DistillTrainer, masked: bool) -> dict[str, Tensor]:
    rows = [trainer.train_dataset[i] for i in range(2)]
    return trainer.data_collator([{**row, "labels": [-100] * len(row["labels"])} for row in rows] if masked else rows)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("family", by_kind())
def test_where_everything_is_masked_loss_and_gradient_are_zero(family: str, divergence: str) -> None:
    trainer = trainer_on(MASKS["0%"], family, divergence=divergence, hidden_weight=1.0, hidden_projector=True)
    trainer.model.train()
    for items in (None, torch.tensor(5), torch.tensor(0)):
        loss = trainer.compute_loss(trainer.model, _batch(trainer, masked=True), num_items_in_batch=items)
        assert loss.item() == 0.0
        loss.backward()
    assert trainer.projectors is not None and not hasattr(trainer.model, NAME)
    reached = [p.grad for p in (*trainer.model.parameters(), *trainer.projectors.parameters()) if p.grad is not None]
    assert len(reached) > 10
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in reached)
    loss, logits, labels = trainer.prediction_step(trainer.model, _batch(trainer, masked=True), False)
    assert loss.item() == 0.0
    assert logits is not None and labels is not None and logits.shape[:2] == labels.shape


def test_a_masked_micro_batch_changes_nothing() -> None:
    trainer = trainer_on(MASKS["0%"], "llama", hidden_weight=1.0)
    trainer.model.train()
    found = []
    for batches in ([False], [True, False, True]):
        trainer.model.zero_grad()
        items, losses = torch.tensor(12), []
        for masked in batches:
            losses.append(trainer.compute_loss(trainer.model, _batch(trainer, masked), num_items_in_batch=items))
            losses[-1].backward()
        grads = {name: gradient.clone() for name, gradient in gradients(trainer.model).items()}
        found.append((sum(loss.item() for loss in losses), grads))
    assert found[0][0] == found[1][0] > 0
    assert_same_gradient(found[1][1], found[0][1])
