"""The pure parts of the benchmark of starts: FLOPs, reading a curve, weight subcloning, tables."""

import math

import pytest
import torch
from trl import SFTTrainer

from benchmarks.curves import mean_loss, measured_curve, tokens_to_reach
from benchmarks.flops import Way, chain_flops, counted_parameters, family_sizes, training_flops
from benchmarks.start_for_training import point_steps
from benchmarks.start_report import (
    MEAN,
    family_costs,
    family_table,
    loss_table,
    plot_curves,
    scratch_needs,
    scratch_table,
)
from benchmarks.starts import outer_layers, subclone
from cbd_trl.architectures import describe
from cbd_trl.surgery.weights import weights_of
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.training import make_config, text_rows


def curve(*points):
    """Points of two texts half a nat above and below the given loss."""
    return [{"tokens": tokens, "loss": {"A": loss + 0.5, "B": loss - 0.5}} for tokens, loss in points]


CURVES = {
    "nested": curve((0, 4.0), (100_000, 3.0), (300_000, 2.5)),
    "direct": curve((0, 5.0), (100_000, 3.5)),
    "scratch": curve((0, 10.0), (100_000, 6.0), (300_000, 4.0)),
}


def test_training_is_six_n_d_and_a_teacher_two_more_of_its_own():
    assert training_flops(10, 3) == 180
    assert training_flops(10, 3, teacher=5) == 180 + 30


def test_a_chain_is_its_statistics_refits_and_distillation():
    statistics, refit = 2 * 100 * 2 + 2 * 50 * 2, 2 * 100 * 2 + 2 * 50 * 2
    plain = statistics + refit + 6 * 50 * 7 + 2 * 100 * 7
    assert chain_flops([100, 50], [0, 7], 2, [0.0, 0.0]) == plain
    assert chain_flops([100, 50], [0, 7], 2, [0.0, 0.5]) == plain + 0.5 * 6 * 75 * 7


def test_a_chain_is_paid_once_and_a_teacher_for_every_size():
    assert Way(once=1000).flops([10, 20], 3) == 1000 + 6 * 30 * 3
    direct = Way(once=400, teacher=100, refit_tokens=2)
    assert direct.flops([10, 20], 3) == 400 + 6 * 30 * 3 + 2 * (2 * 100 * 3) + 2 * (10 + 100) * 2 + 2 * (20 + 100) * 2


def test_family_sizes_leave_the_ends_out():
    assert family_sizes(40, 140, 1) == [90]
    assert family_sizes(40, 140, 4) == [60, 80, 100, 120]


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_that_is_only_looked_up_does_not_count(tied):
    model = tiny_model("llama", tie_word_embeddings=tied)
    looked_up = 0 if tied else model.get_input_embeddings().weight.numel()
    assert counted_parameters(describe(model.config)) == model.num_parameters() - looked_up


@pytest.mark.parametrize(
    ("level", "tokens"), [(11, 0), (10, 0), (9, 25_000), (5, 200_000), (4, 300_000), (3.99, None)]
)
def test_tokens_to_reach_a_level_on_straight_lines(level, tokens):
    assert tokens_to_reach(CURVES["scratch"], level) == tokens


def test_the_first_crossing_counts_where_a_curve_rises_again():
    assert tokens_to_reach(curve((0, 4), (100, 2), (200, 3), (300, 1)), 3) == 50


def test_points_are_whole_steps_and_the_last_one_ends_the_run():
    assert point_steps(100_000) == [0, 10, 24, 49, 73, 98]
    assert point_steps(300_000)[5:] == [98, 146, 195, 293]
    assert point_steps(2048) == [0, 2]


def test_outer_layers_drop_the_middle():
    assert outer_layers(30, 16) == [*range(8), *range(22, 30)]
    assert outer_layers(5, 3) == [0, 1, 4]
    assert outer_layers(4, 4) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"Cannot keep 5 of 4 layers.*at most as many"):
        outer_layers(4, 5)


@pytest.mark.parametrize("tied", [True, False])
def test_subcloning_keeps_prefixes_and_scales_what_reads_fewer_inputs(tied):
    model = tiny_model("llama", tie_word_embeddings=tied)
    state, architecture = model.state_dict(), describe(model.config)
    fields = {"num_hidden_layers": 3, "hidden_size": 24, "intermediate_size": 12}
    weights, target = subclone(weights_of(model, architecture), architecture, fields)

    def kept(name, rows=None, columns=None):
        return state[name][:rows, :columns] if state[name].ndim == 2 else state[name][:rows]

    wide, ffn = math.sqrt(32 / 24), math.sqrt(48 / 12)
    assert target.shape == {**architecture.shape, **fields}
    # Layer 2 of 4 is dropped: layer 3 comes third.
    for new, old in enumerate((0, 1, 3)):
        here, there = f"model.layers.{new}.", f"model.layers.{old}."
        expected = {
            "self_attn.q_proj.weight": kept(f"{there}self_attn.q_proj.weight", columns=24) * wide,
            "self_attn.o_proj.weight": kept(f"{there}self_attn.o_proj.weight", rows=24),
            "mlp.up_proj.weight": kept(f"{there}mlp.up_proj.weight", 12, 24) * wide,
            "mlp.down_proj.weight": kept(f"{there}mlp.down_proj.weight", 24, 12) * ffn,
            "input_layernorm.weight": kept(f"{there}input_layernorm.weight", rows=24),
        }
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[here + name], tensor)
    table = kept("model.embed_tokens.weight", columns=24)
    torch.testing.assert_close(weights["model.embed_tokens.weight"], table * wide if tied else table)
    if not tied:
        torch.testing.assert_close(weights["lm_head.weight"], kept("lm_head.weight", columns=24) * wide)


def test_a_curve_is_measured_before_and_between_the_steps(tmp_path):
    args = make_config(output_dir=str(tmp_path), max_steps=3, max_length=8, packing=True, packing_strategy="wrapped")
    trainer = SFTTrainer(
        tiny_model("llama"), args, train_dataset=text_rows([20] * 8), processing_class=tiny_tokenizer()
    )
    gain = trainer.model.model.norm.weight
    before = gain[0].item()
    measured = measured_curve(trainer, [0, 2, 3], lambda model: {"gain": model.model.norm.weight[0].item()})
    assert [point["tokens"] for point in measured] == [0, 2 * 4 * 8, 3 * 4 * 8]
    values = [mean_loss(point) for point in measured]
    assert values[0] == before
    assert values[2] == gain[0].item()
    assert len(set(values)) == 3


def test_tables_say_more_than_where_scratch_never_comes_down():
    needs = scratch_needs(CURVES)
    assert [need["scratch"] for need in needs["nested"]] == [300_000, None, None]
    assert [need["scratch"] for need in needs["direct"]] == [200_000, None]
    assert scratch_table(CURVES).splitlines()[2] == "| nested (default) | 300k | > 300k | > 300k |"
    assert loss_table(CURVES, "A").splitlines()[2:] == [
        "| nested (default) | 4.500 | 3.500 | 3.000 |",
        "| direct one-shot distillation (tokens of the teacher) | 5.500 | 4.000 |  |",
        "| scratch | 10.500 | 6.500 | 4.500 |",
    ]
    assert loss_table(CURVES, MEAN).splitlines()[-1] == "| scratch | 10.000 | 6.000 | 4.000 |"


def test_a_family_is_charged_the_tokens_that_its_way_needs():
    parameters, tokens, hybrids = [130e6, 90e6], [0, 1000], [0.0, 0.5]
    costs = family_costs(CURVES, 3.5, parameters, tokens, hybrids)
    chain = chain_flops(parameters, tokens, 8192, hybrids)
    assert costs["nested"]["tokens"] == 50_000
    assert costs["nested"]["flops"][0] == pytest.approx(chain + 6 * 110e6 * 50_000)
    assert costs["nested"]["flops"][1] == pytest.approx(chain + 5 * 6 * 110e6 * 50_000)
    assert costs["scratch"] == {
        "tokens": 300_000,
        "reached": False,
        "flops": [pytest.approx(count * 6 * 110e6 * 300_000) for count in (1, 5, 20)],
    }
    assert family_table(costs).splitlines()[-1] == "| scratch | > 300k | > 1.98e+14 | > 9.90e+14 | > 3.96e+15 |"


def test_the_picture_is_written(tmp_path):
    plot_curves(CURVES, tmp_path / "new" / "curves.png", "Starts")
    assert (tmp_path / "new" / "curves.png").stat().st_size > 10_000
