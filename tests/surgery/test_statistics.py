"""Moments of the streams: equal to a naive twin, padding left out, stored and read back."""

import pytest
import torch

from cbd_trl.architectures import decoder_layers
from cbd_trl.architectures.axes import axis_length
from cbd_trl.surgery.statistics import FACTORIZING, Statistics, collect_in_groups, collect_statistics, site_groups
from tests.surgery.helpers import described, every_case, every_family, full_model, reading_module, tokens


def _close(statistics: Statistics, other: Statistics) -> None:
    assert set(statistics.means) == set(other.means) == set(statistics.seconds)
    assert set(statistics.squares) == set(other.squares)
    for norm in other.squares:
        torch.testing.assert_close(statistics.variances(norm), other.variances(norm), rtol=1e-4, atol=1e-5)
    for site in other.means:
        torch.testing.assert_close(statistics.mean(site), other.mean(site), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistics.second(site), other.second(site), rtol=1e-4, atol=1e-5)


def _naive_streams(model, architecture, batch):
    """{site or output norm: (tokens, D)}: inputs of the readers, behind a norm without its gain and bias; outputs of
    the norms over outputs without their gain. Nothing of ours is used."""
    streams, handles = {}, []

    def keep(name, tensor):
        streams[name] = tensor.reshape(-1, tensor.shape[-1]).double()

    for site in architecture.measured_sites:
        reader, _ = reading_module(model, architecture, site.readers[0])
        handles.append(reader.register_forward_pre_hook(lambda _, inputs, name=site.name: keep(name, inputs[0])))
    over_outputs = [norm.name for norm in architecture.output_norms if norm.axis != ("dim",)]
    for name in over_outputs:
        norm = model.get_submodule(name)
        handles.append(norm.register_forward_hook(lambda _, __, output, name=name: keep(name, output)))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    offset = architecture.family.gain_offset
    for name in [site.name for site in architecture.measured_sites if site.norm] + over_outputs:
        norm = model.get_submodule(name)
        bias = getattr(norm, "bias", None)
        gain = offset + norm.weight.detach() if hasattr(norm, "weight") else 1
        streams[name] = (streams[name] - (0 if bias is None else bias.detach())) / gain
    return streams


@every_case
def test_moments_equal_a_naive_computation(family, tied):
    model = full_model(family, tied)
    _, architecture = described(model)
    batch = {"input_ids": tokens(3, 10)}
    statistics = collect_statistics(model, architecture, [batch])
    streams = _naive_streams(model, architecture, batch)
    assert statistics.tokens == 30
    assert set(statistics.means) == {site.name for site in architecture.measured_sites}
    assert statistics.squares.keys() == streams.keys()
    for name, square in statistics.squares.items():
        torch.testing.assert_close(square.double(), streams[name].square().mean(0), rtol=1e-4, atol=1e-5)
        assert square.dtype == torch.float32
    for name, stream in ((site.name, streams[site.name]) for site in architecture.measured_sites):
        second = sum(torch.outer(row, row) for row in stream) / 30
        torch.testing.assert_close(statistics.mean(name), stream.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistics.second(name), second, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistics.variances(name), second.diagonal(), rtol=1e-4, atol=1e-5)
        assert statistics.means[name].dtype == statistics.seconds[name].dtype == torch.float32


@every_family
def test_padding_counts_for_nothing(family):
    # Eager attention (Gemma 2) makes NaN of a wholly masked row in float64.
    model = full_model(family, True).float()
    _, architecture = described(model)
    rows = tokens(3, 12)
    lengths = [12, 7, 1]
    mask = torch.tensor([[1] * length + [0] * (12 - length) for length in lengths])
    padded = collect_statistics(model, architecture, [{"input_ids": rows, "attention_mask": mask}])
    alone = [{"input_ids": row[None, :length]} for row, length in zip(rows, lengths, strict=True)]
    expected = collect_statistics(model, architecture, alone)
    assert padded.tokens == expected.tokens == 20
    _close(padded, expected)


@every_family
def test_collecting_leaves_the_model_as_it_was(family):
    model = full_model(family, True).train()
    _, architecture = described(model)
    batch = {"input_ids": tokens(), "labels": torch.full((4, 24), -100)}
    with_labels = collect_statistics(model, architecture, [batch])
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    _close(with_labels, collect_statistics(model.eval(), architecture, [{"input_ids": tokens()}]))
    assert not model.training


def test_a_failing_batch_leaves_no_hooks_behind():
    model = full_model("llama", True)
    _, architecture = described(model)
    with pytest.raises(IndexError):
        collect_statistics(model, architecture, [{"input_ids": torch.full((1, 3), 10**6)}])
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "batches",
    [[], [{"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3, dtype=torch.long)}]],
    ids=["no batch", "padding only"],
)
def test_no_tokens_is_an_error(batches):
    model = full_model("llama", True)
    _, architecture = described(model)
    with pytest.raises(ValueError, match="dataset"):
        collect_statistics(model, architecture, batches)


@every_case
def test_groups_have_the_moments_of_one_pass_to_the_bit(family, tied):
    model = full_model(family, tied).float()
    _, architecture = described(model)
    batches = [{"input_ids": tokens(2, 12, seed)} for seed in range(3)]
    whole = collect_statistics(model, architecture, batches)
    largest = 4 * max(len(mean) for mean in whole.means.values()) ** 2
    for budget, count in ((1, len(architecture.measured_sites)), (int((FACTORIZING + 3) * largest), None), (2**40, 1)):
        parts = list(collect_in_groups(model, architecture, batches, budget=budget))
        assert len(parts) == count if count else 1 < len(parts) < len(architecture.measured_sites)
        for kind in ("means", "squares", "seconds"):
            found = {name: moments for part in parts for name, moments in getattr(part, kind).items()}
            expected = getattr(whole, kind)
            assert sum(len(getattr(part, kind)) for part in parts) == len(found)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in found), kind
        assert {part.tokens for part in parts} == {72}


@pytest.mark.parametrize("units", [1, 5, 9, 1000])
def test_a_group_is_within_its_budget_or_a_single_site(units):
    _, architecture = described(full_model("llama", True))
    largest = max(axis_length(site.axis, architecture.sizes) for site in architecture.measured_sites)
    budget = units * 4 * largest**2
    for group in site_groups(architecture, budget):
        sizes = [
            axis_length(site.axis, architecture.sizes) for site in architecture.measured_sites if site.name in group
        ]
        used = sum(4 * size**2 for size in sizes) + FACTORIZING * 4 * max(sizes) ** 2
        assert used <= budget or len(sizes) == 1


def test_a_pass_ends_at_the_last_site_that_is_wanted():
    model = full_model("llama", True)
    _, architecture = described(model)
    ran = []
    for number, layer in enumerate(decoder_layers(model)):
        layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    model.lm_head.register_forward_pre_hook(lambda *_: ran.append("head"))
    wanted = [site.name for site in architecture.measured_sites if ".layers.1." in site.name]
    batches = [{"input_ids": tokens(1, 8, seed)} for seed in range(2)]
    found = collect_statistics(model, architecture, batches, sites=wanted)
    assert list(found.means) == wanted and ran == [0, 1, 0, 1]
    ran.clear()
    collect_statistics(model, architecture, batches)
    assert "head" not in ran


def test_second_moments_of_several_sites_are_added_up():
    model = full_model("llama", True)
    _, architecture = described(model)
    batches = [{"input_ids": tokens(2, 12)}]
    whole = collect_statistics(model, architecture, batches)
    names = [site.name for site in architecture.measured_sites if site.axis == ("width",)]
    found = collect_statistics(model, architecture, batches, seconds=dict.fromkeys(names, "stream"))
    assert found.seconds.keys() == {"stream"} and found.means.keys() == whole.means.keys()
    torch.testing.assert_close(found.seconds["stream"], sum(whole.seconds[name] for name in names))


def test_moments_in_other_coordinates():
    model = full_model("llama", True)
    _, architecture = described(model)
    batches = [{"input_ids": tokens(2, 12)}]
    plain = collect_statistics(model, architecture, batches)
    mirrored = collect_statistics(model, architecture, batches, change=lambda name, rows: rows.flip(1))
    for name, mean in plain.means.items():
        torch.testing.assert_close(mirrored.means[name], mean.flip(0))
        torch.testing.assert_close(mirrored.second(name), plain.second(name).flip(0, 1))
