"""Second moments as triangular factors, and factors in few bits.

cov(x) + ridge diag = L L^T with L lower triangular. In the order of a sorted model, the leading block of L is the
factor of the leading block of the covariance, so one stored factor solves for every prefix; and whatever is rounded in
L, the product stays positive definite; rounded moments do not.

In units of each coordinate's deviation the entries of L below the diagonal are stored in BITS bits with a scale for
each column, in steps that grow with the entry (most entries are far below the largest), the diagonal in float32.
"""

import torch

BITS = 6
_PANEL = 32
_OFFSET = 2 ** (BITS - 1)
# An entry is its step to this power: of 1, 1.5 and 2 the one that costs the fits least (SmolLM2-135M).
_POWER = 1.5
_STEPS = torch.arange(_OFFSET * 2, dtype=torch.float32, device="cpu") - _OFFSET
# What a byte's low bits stand for, in units of the column's scale; looked up by whole bytes, the high bits in them.
_ENTRIES = (_STEPS * _STEPS.abs() ** (_POWER - 1)).repeat(2 ** (8 - BITS))


def deviations(mean: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Standard deviations, kept away from zero where a coordinate is constant: (D,) float64 from E[x] and E[x^2]."""
    mean, squares = mean.double(), squares.double()
    # Single precision sums leave nothing below this of a constant coordinate's variance.
    return (squares - mean.square()).clamp(min=1e-6 * squares + 1e-12 * squares.mean()).sqrt()


def factorise(mean: torch.Tensor, second: torch.Tensor, kept: torch.Tensor, ridge: float) -> torch.Tensor:
    """The columns of L that belong to the coordinates `kept`, which come first: (D, P), rows in their own order.

    Args:
        mean, second: E[x], (D,), and E[x x^T], (D, D).
        kept: (P,) int64, ascending.
        ridge: added to the correlations' diagonal; more where rounding made the moments indefinite.
    """
    deviation = deviations(mean, second.diagonal())
    correlation = (second - torch.outer(mean, mean)) / deviation[:, None] / deviation
    columns = correlation[:, kept]
    block = columns[kept]
    for _ in range(20):
        block.diagonal().add_(ridge)
        triangle, failed = torch.linalg.cholesky_ex(block)
        if not failed:
            break
        ridge *= 9
    factor = torch.linalg.solve_triangular(triangle.T, columns, upper=True, left=False)
    factor[kept] = triangle
    return factor * deviation[:, None]


def pack(factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A lower triangular (D, D) matrix in few bits.

    Returns:
        uint8 codes of what is below the diagonal, panel by panel of 32 columns, and the columns' scales, (D,) float32.
    """
    below = factor.tril(-1)
    largest = _OFFSET - 1
    scales = (below.abs().amax(0) / largest**_POWER).float()
    ratios = below.abs() / scales.clamp(min=torch.finfo(torch.float32).tiny)
    steps = ratios.pow(1 / _POWER).round().clamp(max=largest) * below.sign()
    codes = (steps + _OFFSET).to(torch.uint8)
    size = len(factor)
    return torch.cat([_pack(codes[start:, start : start + _PANEL]) for start in range(0, size, _PANEL)]), scales


def unpack(codes: torch.Tensor, scales: torch.Tensor, units: torch.Tensor, columns: int) -> torch.Tensor:
    """The leading columns of what `pack` was given, without the diagonal, row i times units[i]: (D, columns) float32.

    Panel by panel, each of which stays in the cache from its codes to its place.
    """
    size, position = len(scales), 0
    factor = torch.empty(size, columns)
    for start in range(0, columns, _PANEL):
        rows, width = size - start, min(_PANEL, size - start)
        used = min(width, columns - start)
        length = _packed_length(rows * width)
        panel = _unpack(codes[position : position + length], rows * width).view(rows, width)[:, :used]
        panel.mul_(scales[start : start + used])
        place = factor[:, start : start + used]
        place[:start].zero_()
        torch.mul(panel, units[start:, None], out=place[start:])
        position += length
    return factor


def packed_bytes(size: int) -> int:
    """Bytes of the codes of a (size, size) factor."""
    return sum(_packed_length((size - start) * min(_PANEL, size - start)) for start in range(0, size, _PANEL))


def _packed_length(count: int) -> int:
    return 3 * -(-count // 4)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Four codes in three bytes: the two free bits of each of the first three hold the fourth."""
    codes = codes.flatten()
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % 4)).view(4, -1)
    return torch.stack([codes[i] | (codes[3] >> 2 * i & 3) << BITS for i in range(3)]).flatten()


def _unpack(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Inverse of `_pack`, as entries in units of their column's scale, float32."""
    parts = packed.view(3, -1)
    high = parts >> BITS
    codes = torch.cat([packed, high[0] | high[1] << 2 | high[2] << 4])[:count]
    return _ENTRIES.index_select(0, codes.int())
