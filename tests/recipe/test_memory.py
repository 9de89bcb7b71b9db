"""Memory as a dry run tells it. `tests/device/memory.py` compares it with what a build holds."""

import dataclasses
import io
from typing import Any

import pytest
import torch
from rich.console import Console

from cbd_trl import DistillConfig
from cbd_trl.build.plan import Given, plan_chain
from cbd_trl.recipe.check import Check, how_it_fits, memory_table
from cbd_trl.recipe.estimate import LIBRARIES, Cost, Speed, anchor_cost, smallest_gpu
from cbd_trl.recipe.memory import Phase, anchor_phases, optimizer_bytes
from cbd_trl.recipe.schema import parse_recipe
from cbd_trl.recipe.trace import traced
from cbd_trl.targets.many import multiplied_weights
from tests.recipe.helpers import ARGS, raw_recipe
from tests.surgery.helpers import described
from tests.tiny import MIXTURES, tiny_model
from tests.tokenizer import tiny_tokenizer

GPU = torch.device("cuda")
SPEED = Speed(products=4e9, device="cpu", training=2e9, forward=2e9)


def _args(**changes: object) -> DistillConfig:
    fixed = {"swap_probability": 0.0, "gradient_checkpointing": False, "bf16": False, "max_length": 64}
    return DistillConfig("unused", **{**ARGS, **fixed, **changes})


def _train(device: torch.device = GPU, **changes: object) -> int:
    """Bytes of the training of 2 layers by 4."""
    upper = described(tiny_model("llama", num_hidden_layers=4, vocab_size=2000))[1]
    [step] = plan_chain(upper, [{"num_hidden_layers": 2}], _args(**changes), None)
    phases = anchor_phases(upper, step, 64, device)
    assert [phase.name for phase in phases] == ["choose layers", "refit", "train", "statistics"]
    return phases[2].device


def test_storages_are_counted_once_and_as_long_as_they_live() -> None:
    with traced(GPU) as count:
        table = torch.empty(4, 8)
        view = table[1:]
        assert count.now == 128
        scored = table[torch.ones(4, dtype=torch.bool)]
        # All four rows, and the mask is gone.
        assert scored.shape == (4, 8) and count.peak >= 128 + 128 + 4
        del table, scored
        assert count.now == 128
        del view
        assert count.now == 0


def test_a_training_takes_less_with_what_saves_memory() -> None:
    whole = _train()
    assert _train(gradient_checkpointing=True) < whole
    assert _train(per_device_train_batch_size=1) < whole
    assert _train(loss_chunk_size=8) < whole
    assert _train(swap_probability=1.0) > whole
    assert _train(packing=True) < whole


def _phases(model: Any, **changes: object) -> tuple[dict[str, int], float | None]:
    """Bytes of the phases of an anchor, and its seconds."""
    upper = described(tiny_model("llama", num_hidden_layers=4, vocab_size=2000))[1]
    [step] = plan_chain(upper, [model], _args(**changes), None, Given(tiny_tokenizer(), None, []))
    phases = anchor_phases(upper, step, 64, GPU)
    return {phase.name: phase.device for phase in phases}, anchor_cost(upper, step, 64, SPEED).seconds


def test_a_second_teacher_is_held_and_run() -> None:
    shape = {"num_hidden_layers": 2, "head_dim": 4, "vocab_size": 2000}
    teacher = tiny_model("llama", seed=2, **shape)
    [step] = plan_chain(
        described(tiny_model("llama", vocab_size=2000))[1], [teacher], _args(), None, Given(tiny_tokenizer(), None, [])
    )
    both, taught = _phases(teacher)
    alone, seconds = _phases(step.architecture.shape)
    assert both["refit"] == alone["refit"] and taught and seconds
    held, weights = both["train"] - alone["train"], 4 * teacher.num_parameters()
    # Beside its weights its logits, and those of the mixture, for every scored token.
    assert weights < held < weights + 6 * 4 * 2 * 64 * 2000
    tokens = 2 * 2 * 64
    assert taught - seconds == pytest.approx(tokens * 2 * multiplied_weights(described(teacher)[1]) / SPEED.training)


@pytest.mark.parametrize(("above", "copies"), [({"tie_word_embeddings": True}, 1), ({}, 2)])
def test_a_matched_model_is_compared_and_neither_cut_nor_refitted(above: dict[str, Any], copies: int) -> None:
    upper, model = (
        tiny_model("llama", seed=seed, num_hidden_layers=depth, **above) for seed, depth in ((1, 4), (2, 2))
    )
    [step] = plan_chain(described(upper)[1], [model], _args(), None, Given(tiny_tokenizer(), None, []))
    phases = anchor_phases(described(upper)[1], step, 64, GPU)
    assert [phase.name for phase in phases] == ["match", "train", "statistics"]
    held = 4 * (upper.num_parameters() + copies * model.num_parameters())
    # Gram matrices of 1,024 tokens, twice of four layers.
    assert held + 4 * 2 * 4 * 1024**2 < phases[0].device < held + 2 * 4 * 2 * 4 * 1024**2


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_counted_by_the_tokens_that_they_see(family: str) -> None:
    def phases(anchor: dict[str, int], used: int) -> dict[str, int]:
        upper = described(tiny_model(family, num_experts_per_tok=used))[1]
        [step] = plan_chain(upper, [anchor], _args(swap_probability=1.0), None)
        return {phase.name: phase.device for phase in anchor_phases(upper, step, 64, GPU)}

    for anchor in ({"num_hidden_layers": 3}, {"hidden_size": 24, "num_experts": 4}):
        few, many = (phases(anchor, used) for used in (2, 4))
        assert few.keys() == many.keys() >= {"refit", "train", "statistics"}
        assert few["train"] < many["train"] and few["refit"] < many["refit"]


def test_a_narrower_model_with_a_buffer_of_its_own_is_counted() -> None:
    """Gemma's table holds its factor, which is made where its hybrid is, and no tensor without data."""
    upper = described(tiny_model("gemma3_text", num_hidden_layers=4))[1]
    narrow = [{"hidden_size": 16}]
    alone, hybrid = (
        anchor_phases(upper, plan_chain(upper, narrow, _args(swap_probability=share), None)[0], 64, GPU)
        for share in (0.0, 1.0)
    )
    assert [phase.name for phase in alone] == ["refit", "train", "statistics"]
    assert hybrid[1].device > alone[1].device


def test_the_optimizer_is_counted_by_its_states() -> None:
    student = described(tiny_model("llama"))[1]
    count = student.num_parameters
    assert optimizer_bytes(student, _args(optim="adamw_torch"), torch.float32) == 8 * count
    assert optimizer_bytes(student, _args(optim="sgd"), torch.float32) == 0
    assert optimizer_bytes(student, _args(optim="adamw_torch"), torch.bfloat16) == 4 * count
    assert 0 < optimizer_bytes(student, _args(optim="adafactor"), torch.float32) < count


def _cost(phases: list[Phase], args: DistillConfig | None = None) -> Cost:
    upper = described(tiny_model("llama", num_hidden_layers=4))[1]
    [step] = plan_chain(upper, [{"num_hidden_layers": 2}], args or _args(), None)
    return dataclasses.replace(anchor_cost(upper, step, 64, SPEED), predict=lambda *_: phases)


@pytest.mark.parametrize(("gigabytes", "gpu"), [(10, 16), (15.5, 24), (39, 80), (133, 141), (140, None)])
def test_the_smallest_gpu(gigabytes: float, gpu: int | None) -> None:
    cost = _cost([Phase("train", int(gigabytes * 1e9) - LIBRARIES), Phase("refit", 1)])
    assert smallest_gpu(cost.gpu_memory) == gpu


def test_phases_are_shown_and_the_peak_is_named(tmp_path: Any) -> None:
    check = Check(parse_recipe(raw_recipe(tmp_path), "mine"))
    check.costs = [_cost([Phase("refit", 1_500_000_000), Phase("train", 7_000_000_000)])]
    out = io.StringIO()
    Console(width=120, file=out).print(memory_table(check))
    assert "2 GB" in out.getvalue() and "train (peak)" in out.getvalue() and "refit (peak)" not in out.getvalue()
    told = how_it_fits(check)
    assert "On a GPU: 7.5 GB at most" in told and "one of 16 GB holds" in told and "Each of these" not in told


def test_what_to_change_where_it_does_not_fit(tmp_path: Any) -> None:
    def predict(args: DistillConfig, device: torch.device) -> list[Phase]:
        return [
            Phase("train", int((2e11 if args.gradient_checkpointing else 3e11) * args.per_device_train_batch_size))
        ]

    check = Check(parse_recipe(raw_recipe(tmp_path), "mine"))
    check.costs = [dataclasses.replace(_cost([], _args(per_device_train_batch_size=2)), predict=predict)]
    told = how_it_fits(check)
    assert "no common one (141 GB at most) alone holds" in told and "gradient_checkpointing: true (200 GB)" in told
    assert "per_device_train_batch_size: 1, gradient_accumulation_steps: 2" in told and "loss_chunk_size" not in told
