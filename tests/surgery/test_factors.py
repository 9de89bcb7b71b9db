"""Triangular factors of moments, and their storage in few bits."""

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from cbd_trl.architectures import describe
from cbd_trl.architectures.axes import axis_length
from cbd_trl.surgery.statistics import cholesky, correlations, deviations, factorize
from cbd_trl.surgery.statistics_file import BITS, pack, packed_bytes, unpack


def random_moments(size, rows=300, seed=0):
    """E[x], E[x x^T] of correlated streams whose scales differ a thousandfold."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    stream = torch.randn(rows, size, generator=generator, dtype=torch.float64) @ mix + 3
    stream = stream * torch.logspace(-1.5, 1.5, size, dtype=torch.float64)
    return stream.mean(0), stream.T @ stream / rows


@pytest.mark.parametrize("kept", [range(7), [0, 2, 3, 7, 9], range(10), [4]])
def test_a_factor_gives_the_covariance_and_its_ridge(kept):
    mean, second = random_moments(10)
    kept = torch.tensor(list(kept))
    covariance = second - torch.outer(mean, mean)
    factor = factorize(mean, second, kept, 1e-2)
    assert torch.equal(factor[kept], factor[kept].tril()) and (factor[kept].diagonal() > 0).all()
    expected = covariance + 1e-2 * torch.diag(covariance.diagonal())
    torch.testing.assert_close((factor @ factor[kept].T)[kept], expected[kept][:, kept])
    rest = [i for i in range(10) if i not in kept.tolist()]
    torch.testing.assert_close((factor @ factor[kept].T)[rest], covariance[rest][:, kept])


def test_a_prefix_has_the_leading_columns_of_the_whole_factor():
    mean, second = random_moments(12)
    whole = factorize(mean, second, torch.arange(12), 1e-3)
    torch.testing.assert_close(factorize(mean, second, torch.arange(5), 1e-3), whole[:, :5])


def test_constant_coordinates_and_moments_that_are_not_quite_positive():
    mean, second = random_moments(6, rows=3)
    mean[1], second[1], second[:, 1] = 0.0, 0.0, 0.0
    mean[2] = 5.0
    second[2] = second[:, 2] = 5.0 * mean
    second = second.float().double()
    factor = factorize(mean, second, torch.arange(6), 1e-12)
    assert factor.isfinite().all() and (factor.diagonal() > 0).all()
    assert 0 < deviations(mean, second.diagonal())[1] < 1e-5 * deviations(mean, second.diagonal()).max()
    # A dead coordinate goes with nothing.
    assert factor[[0, 2, 3, 4, 5], 1].abs().max() < 1e-6


def correlated(size, rows, seed=0):
    """Correlations in float64 of few rows of many coordinates: positive up to rounding, of no full rank."""
    mean, second = random_moments(size, rows, seed)
    return correlations(mean, second, deviations(mean, second.diagonal()))


@pytest.mark.parametrize("rows", [600, 20])
def test_single_precision_gives_the_factor_that_double_precision_gives(rows):
    matrix = correlated(200, rows)
    exact, found = cholesky(matrix.clone(), 1e-3), cholesky(matrix.float(), 1e-3)
    assert found.dtype == torch.float32
    expected = matrix + 1e-3 * torch.eye(200)
    assert (found.double() @ found.double().T - expected).abs().max() < 1e-5
    # As good as what the six bits of a stored entry leave.
    assert (found - exact).abs().max() < 1e-2 * exact.abs().max()


def test_where_single_precision_fails_it_is_double():
    ridge = 1e-9
    matrix = correlated(200, 20)
    found, exact = cholesky(matrix.float(), ridge), cholesky(matrix.float().double(), ridge)
    assert found.dtype == torch.float64 and found.isfinite().all()
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("size", [1, 5, 32, 33, 100])
def test_packing_rounds_to_the_nearest_step_of_each_column(size):
    factor = factorize(*random_moments(size), torch.arange(size), 1e-3)
    codes, scales = pack(factor)
    assert codes.dtype == torch.uint8 and len(codes) == packed_bytes(size)
    found, below = unpack(codes, scales, torch.ones(size), size), factor.tril(-1)
    largest = 2 ** (BITS - 1) - 1
    torch.testing.assert_close(scales, (below.abs().amax(0) / largest**1.5).float())

    def steps(entries):
        return entries.sign() * (entries.abs() / scales.clamp(min=1e-30)) ** (1 / 1.5)

    gaps = (steps(found) - steps(below)).abs()
    assert gaps.max() <= 0.5001
    if size > 1:
        assert gaps.max() > 0.1 and steps(found).abs().max() > largest - 1e-3


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 70])
def test_leading_columns_are_unpacked_alone(columns):
    codes, scales = pack(factorize(*random_moments(70), torch.arange(70), 1e-3))
    units = torch.linspace(1, 9, 70)
    leading = unpack(codes, scales, units, columns)
    assert torch.equal(leading, unpack(codes, scales, units, 70)[:, :columns])
    assert torch.equal(leading, unpack(codes, scales, torch.ones(70), columns) * units[:, None])
    assert torch.equal(leading, leading.tril(-1))


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                    num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
        # The widest FFN for its width among the families.
        Qwen2Config(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                    num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    ],
    ids=["SmolLM2-135M", "Qwen2.5-1.5B"],
)  # fmt: skip
def test_statistics_take_a_third_of_the_model_at_most(config):
    architecture = describe(config)
    lengths = [axis_length(site.axis, architecture.sizes) for site in architecture.sites]
    # Five float32 vectors a site besides the codes.
    total = sum(packed_bytes(length) + 20 * length for length in lengths)
    assert 0.1 < total / (2 * architecture.num_parameters) <= 0.35
