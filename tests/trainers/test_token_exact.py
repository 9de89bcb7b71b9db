"""The same rows give the same loss and gradient, however batched or packed. Of two processes: test_launch.py."""

import pytest
import torch

from tests.tiny import PACKING_FAMILIES, SDPA_FAMILIES, by_kind
from tests.training import assert_same_gradient, make_trainer, one_step, text_rows

TERMS = ("loss", "kd", "ce", "hidden", "teacher_ce")


@pytest.mark.parametrize("swap", [0.0, 1.0])
def test_gradient_accumulation(swap: float) -> None:
    runs = [
        one_step(
            make_trainer(
                per_device_train_batch_size=4 // steps,
                gradient_accumulation_steps=steps,
                hidden_weight=1.0,
                swap_probability=swap,
            )
        )
        for steps in (1, 2, 4)
    ]
    for logs, grads in runs[1:]:
        assert_same_gradient(grads, runs[0][1])
        for name in TERMS:
            assert logs[name] == pytest.approx(runs[0][0][name], rel=1e-5), name
        assert logs["num_tokens"] == runs[0][0]["num_tokens"]


# Only row by row, as SDPA runs on a CPU, does OPT keep packed rows apart.
PACKED = {
    "eager": [family for family in PACKING_FAMILIES if family != "opt"],
    "sdpa": [family for family in SDPA_FAMILIES if family in PACKING_FAMILIES],
}


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        pytest.param(*family.values, attention, marks=family.marks)
        for attention, families in PACKED.items()
        for family in by_kind(families)
    ],
)
def test_packed_rows_do_not_see_each_other(family: str, attention: str) -> None:
    def run(**how: object) -> tuple:
        trainer = make_trainer(family, hidden_weight=1.0, swap_probability=1.0, **how)
        for model in (trainer.model, trainer.teacher_model):
            model.set_attn_implementation(attention)
        return one_step(trainer)

    (plain_logs, plain), (packed_logs, packed) = run(), run(packing=True, max_length=20)
    assert_same_gradient(packed, plain)
    for name in TERMS:
        assert packed_logs[name] == pytest.approx(plain_logs[name], rel=1e-5), name


def test_evaluation_is_the_mean_over_tokens_however_it_is_batched() -> None:
    def evaluate(**how: object) -> dict[str, float]:
        return make_trainer(eval_dataset=text_rows((1, 12, 2, 9, 4), seed=3), hidden_weight=1.0, **how).evaluate()

    whole = evaluate(per_device_eval_batch_size=5)
    for how in ({"per_device_eval_batch_size": 1}, {"per_device_eval_batch_size": 2}, {"packing": True}):
        other = evaluate(**how)
        for name in TERMS:
            assert other[f"eval_{name}"] == pytest.approx(whole[f"eval_{name}"], rel=1e-5), (name, how)


def test_evaluation_is_on_the_scale_of_training() -> None:
    trainer = make_trainer(eval_dataset=text_rows(), per_device_eval_batch_size=3, hidden_weight=1.0)
    before = trainer.evaluate()
    one_step(trainer)
    logs = next(entry for entry in trainer.state.log_history if "loss" in entry)
    for name in TERMS:
        assert logs[name] == pytest.approx(before[f"eval_{name}"], rel=1e-5), name


def test_evaluation_matches_a_computation_by_hand() -> None:
    rows = text_rows((2, 8, 5), seed=4)
    trainer = make_trainer(eval_dataset=rows, per_device_eval_batch_size=2, ce_weight=0.5)
    tokens = [trainer.processing_class(row["text"] + "</s>", return_tensors="pt")["input_ids"] for row in rows]
    kd, ce, count = 0.0, 0.0, 0
    with torch.no_grad():
        for ids in tokens:
            student, teacher = (
                m(input_ids=ids).logits[0, :-1].log_softmax(-1) for m in (trainer.model, trainer.teacher_model)
            )
            kd += (teacher.exp() * (teacher - student)).sum().item()
            ce -= student.gather(1, ids[0, 1:, None]).sum().item()
            count += ids.shape[1] - 1
    metrics = trainer.evaluate()
    assert metrics["eval_kd"] == pytest.approx(kd / count, rel=1e-5)
    assert metrics["eval_ce"] == pytest.approx(ce / count, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx((kd + 0.5 * ce) / count, rel=1e-5)


def test_the_log_is_a_mean_over_tokens_and_not_over_steps() -> None:
    logs = [
        one_step(make_trainer(learning_rate=0.0, max_steps=4, logging_steps=4, per_device_train_batch_size=1))[0],
        one_step(make_trainer(learning_rate=0.0))[0],
    ]
    for name in ("kd", "ce", "teacher_ce"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5)
    assert logs[0]["num_tokens"] == logs[1]["num_tokens"] == sum((3, 9, 5, 12)) + 4
