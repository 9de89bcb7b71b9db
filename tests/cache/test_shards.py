"""What a shard weighs, and that it gives back what was put in."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from cbd_trl.cache.shards import CachedRow, check_shard, read_row, stored_bytes, write_shard
from tests.cache.helpers import make_settings, random_prediction


@pytest.mark.parametrize("vocabulary", [49152, 151936, 262144])
def test_top_64_takes_at_most_300_bytes_a_token(tmp_path, vocabulary):
    settings = make_settings(vocabulary_rows=vocabulary, k=64)
    tokens = [np.arange(128, dtype=np.int32)] * 40
    shard, _ = write_shard(tmp_path, 0, settings, tokens, [random_prediction(127, vocabulary, 64)] * 40)
    size = (tmp_path / shard.file).stat().st_size
    assert size / shard.tokens <= 300
    # What is estimated before is what is written, but for the header.
    assert 0 <= size - stored_bytes(settings, shard.rows, shard.tokens) < 2000
    assert size == shard.num_bytes


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
@pytest.mark.parametrize("vocabulary", [64, 151936])
@pytest.mark.parametrize("value_bits", [16, 32])
def test_rows_come_back(tmp_path, kind, vocabulary, value_bits):
    settings = make_settings(kind=kind, vocabulary_rows=vocabulary, k=5, value_bits=value_bits)
    lengths = [4, 2, 9]
    rows = [random_prediction(n - 1, vocabulary, 5, seed=n) for n in lengths]
    tokens = [np.arange(n, dtype=np.int32) for n in lengths]
    shard, highest = write_shard(tmp_path, 0, settings, tokens, rows)
    assert highest == max(int(row.indices.max()) for row in rows)
    check_shard(tmp_path, shard, settings, verify=True)
    with safe_open(tmp_path / shard.file, "pt") as file:
        found = read_row(file, settings, 3 + 1, 6)
    np.testing.assert_array_equal(found.indices, rows[2].indices[:6])
    torch.testing.assert_close(found.target, rows[2].target[:6], rtol=0, atol=0)
    tolerance = 0 if value_bits == 32 else 2e-4
    torch.testing.assert_close(found.log_probs, rows[2].log_probs[:6], rtol=0, atol=tolerance)
    assert (found.tail is None) == (kind == "sampled")
    if found.tail is not None:
        torch.testing.assert_close(found.tail, rows[2].tail[:6], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hidden_states_come_back(tmp_path, dtype):
    settings = make_settings(
        kind="hidden", k=None, temperature=None, value_bits=None, hidden_size=6, hidden_dtype=dtype
    )
    hidden = torch.randn(3, 6).to(getattr(torch, dtype))
    shard, highest = write_shard(tmp_path, 0, settings, [np.arange(4)], [CachedRow(torch.zeros(3), hidden=hidden)])
    with safe_open(tmp_path / shard.file, "pt") as file:
        found = read_row(file, settings, 1, 2)
    assert highest == -1 and found.hidden.dtype == hidden.dtype
    assert torch.equal(found.hidden, hidden[1:])
