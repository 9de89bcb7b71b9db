"""Moments of the streams: equal to a naive twin, padding left out, stored and read back."""

import pytest
import torch

from cbd_trl.surgery.statistics import Statistics, collect_statistics
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

    for site in architecture.sites:
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
    offset = 1 if "Gemma" in type(model).__name__ else 0
    for name in [site.name for site in architecture.sites if site.norm] + over_outputs:
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
    statistics = collect_statistics(model, architecture, [batch], max_tokens=1)
    streams = _naive_streams(model, architecture, batch)
    assert statistics.tokens == 30
    assert set(statistics.means) == {site.name for site in architecture.sites}
    assert set(statistics.squares) == streams.keys() - statistics.means.keys()
    for name, square in statistics.squares.items():
        torch.testing.assert_close(square.double(), streams[name].square().mean(0), rtol=1e-4, atol=1e-5)
        assert square.dtype == torch.float32
    for name, stream in ((site.name, streams[site.name]) for site in architecture.sites):
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
    padded = collect_statistics(model, architecture, [{"input_ids": rows, "attention_mask": mask}], 10**6)
    alone = [{"input_ids": row[None, :length]} for row, length in zip(rows, lengths, strict=True)]
    expected = collect_statistics(model, architecture, alone, 10**6)
    assert padded.tokens == expected.tokens == 20
    _close(padded, expected)


def test_collecting_stops_after_the_batch_that_reaches_the_count():
    model = full_model("llama", True)
    _, architecture = described(model)
    batches = [{"input_ids": tokens(1, 10, seed)} for seed in range(4)]
    few = collect_statistics(model, architecture, iter(batches), max_tokens=11)
    assert few.tokens == 20
    _close(few, collect_statistics(model, architecture, batches[:2], 10**6))


@every_family
def test_collecting_leaves_the_model_as_it_was(family):
    model = full_model(family, True).train()
    _, architecture = described(model)
    batch = {"input_ids": tokens(), "labels": torch.full((4, 24), -100)}
    with_labels = collect_statistics(model, architecture, [batch], 10**6)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    _close(with_labels, collect_statistics(model.eval(), architecture, [{"input_ids": tokens()}], 10**6))
    assert not model.training


def test_a_failing_batch_leaves_no_hooks_behind():
    model = full_model("llama", True)
    _, architecture = described(model)
    with pytest.raises(IndexError):
        collect_statistics(model, architecture, [{"input_ids": torch.full((1, 3), 10**6)}], 10)
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
        collect_statistics(model, architecture, batches, 10)


def test_reindexing_picks_rows_and_columns():
    full = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])
    packed = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    statistics = Statistics(
        {"a": torch.tensor([7.0, 8.0, 9.0]), "b": torch.zeros(1)}, {"a": packed, "b": torch.ones(1)}, 3
    )
    assert torch.equal(statistics.second("a"), full.double())
    picked = statistics.reindexed({"a": torch.tensor([2, 0])})
    assert set(picked.means) == {"a"}
    assert picked.mean("a").tolist() == [9.0, 7.0]
    assert picked.second("a").tolist() == [[6.0, 3.0], [3.0, 1.0]]
