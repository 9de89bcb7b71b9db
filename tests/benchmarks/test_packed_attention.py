"""What attention over packed rows costs, counted without computing it."""

import pytest

from benchmarks.packed_attention import TOKENS, count_flops


@pytest.mark.parametrize("length", [64, 1024])
def test_attention_within_rows_does_no_work_between_them(length: int) -> None:
    assert count_flops("dense", length) == TOKENS // length * count_flops("within rows", length)
