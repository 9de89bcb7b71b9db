"""Ids and log-probabilities survive being packed."""

import numpy as np
import pytest

from cbd_trl.cache.shards import dequantize, high_bits, high_bytes, pack_ids, quantize, row_key, unpack_ids


@pytest.mark.parametrize("bits", range(8, 22))
@pytest.mark.parametrize("k", [1, 3, 64])
def test_ids_of_any_width_round_trip(bits, k):
    vocabulary = 2**bits
    ids = np.random.default_rng(bits).integers(0, vocabulary, (7, k))
    ids[0, 0], ids[-1, -1] = 0, vocabulary - 1
    low, high = pack_ids(ids, vocabulary)
    assert low.dtype == np.uint16 and high.dtype == np.uint8 and high.shape == (7, high_bytes(k, vocabulary))
    np.testing.assert_array_equal(unpack_ids(low, high, vocabulary), ids)


@pytest.mark.parametrize(
    ("vocabulary", "bits"),
    [(1, 0), (65536, 0), (65537, 1), (131072, 1), (131073, 2), (151936, 2), (262144, 2), (262145, 3)],
)
def test_high_bits_is_ceil_log2_less_16(vocabulary, bits):
    assert high_bits(vocabulary) == bits


def test_no_position_round_trips():
    low, high = pack_ids(np.zeros((0, 5), np.int32), 151936)
    assert unpack_ids(low, high, 151936).shape == (0, 5)
    assert dequantize(*quantize(np.zeros((0, 5), np.float32))).shape == (0, 5)


def test_quantized_values_are_off_by_half_a_step():
    values = (
        -np.abs(np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32)) * np.logspace(-3, 2, 200)[:, None]
    )
    values = values.astype(np.float32)
    values[:, 0] = 0.0
    codes, lowest = quantize(values)
    back = dequantize(codes, lowest)
    half_a_step = -lowest / 65534 / 2
    assert (np.abs(back - values) <= half_a_step[:, None] * 1.01).all()
    assert (back[:, 0] == 0).all() and (back <= 0).all()
    np.testing.assert_allclose(back.min(1), values.min(1), rtol=1e-6)


def test_quantized_extremes():
    values = np.array([[0, 0], [-np.inf, 0], [-np.inf, -np.inf], [-1e4, -1e-4], [-1e-30, 0]], np.float32)
    back = dequantize(*quantize(values))
    np.testing.assert_array_equal(back[:3], values[:3])
    np.testing.assert_allclose(back[3:], values[3:], rtol=1e-6, atol=0.08)
    assert not np.isnan(back).any()


def test_key_is_of_the_tokens_alone():
    assert row_key([1, 2, 3]) == row_key(np.array([1, 2, 3], np.int64)) and len(row_key([1])) == 16
    assert len({row_key(row) for row in ([1, 2], [2, 1], [1, 2, 0], [1, 258])}) == 4
