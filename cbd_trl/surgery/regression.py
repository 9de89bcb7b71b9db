"""What a cut stream says of the full one: least squares on stored moments, without a factorisation."""

from dataclasses import dataclass

import torch

from cbd_trl.surgery.statistics import SiteStatistics
from cbd_trl.surgery.weights import working

# Rows that are in hand at a time: few enough to stay in the cache, and in memory that the next ones find again.
_ROWS = 1024


@dataclass(frozen=True)
class Fit:
    """y ~ matrix f + constant, for the entries `rows` of the full stream (the others of y are zero).

    Args:
        kept: entries of the full stream that are features, (P,) int64.
        rows: (R,) int64.
        matrix: (R, P).
        constant: (R,); None without an intercept.
    """

    kept: torch.Tensor
    rows: torch.Tensor
    matrix: torch.Tensor
    constant: torch.Tensor | None

    def refitted(self, matrix: torch.Tensor, share: float, gain: torch.Tensor | None = None) -> torch.Tensor:
        """A reader's matrix as one of what stays.

        Args:
            matrix: (outputs, D).
            share: how far to go towards the fit, 0 to 1.
            gain: (D,) to multiply the columns by first; None: they are as they are to be.

        Returns:
            (outputs, P) in the working dtype.
        """
        columns, rows = _span(self.kept), _span(self.rows)
        fit = self.matrix.to(working(matrix[:0]).dtype)
        if gain is not None:
            gain = gain.to(fit)
            fit = fit * gain[rows, None]
        made = fit.new_empty(len(matrix), len(self.kept))
        # In pieces: the parts in the working dtype never exist as a whole.
        for out, piece in zip(made.split(_ROWS), matrix.split(_ROWS), strict=True):
            own, other = working(piece[:, columns]), working(piece[:, rows])
            if gain is not None:
                own = torch.mul(own, gain[columns], out=out)
            torch.addmm(own, other, fit, alpha=share, out=out)
        return made

    def shifted(self, matrix: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """The reader's bias, (outputs,)."""
        if self.constant is None:
            return bias
        return bias + (matrix[:, _span(self.rows)].double() @ self.constant.double()).to(bias.dtype)


def _span(index: torch.Tensor) -> slice | torch.Tensor:
    """Ascending positions as a slice where they are neighbours: a view then, not a copy."""
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index


def regress(
    statistics: SiteStatistics,
    site: str,
    kept: torch.Tensor,
    gain: torch.Tensor | None,
    shift: torch.Tensor | None,
    centred: bool,
    intercept: bool,
) -> Fit:
    """Least squares of what a cut stream misses on what it has.

    The stored stream is x, the full one that is read u = gain x + shift. The features are f = u[kept], or, where the
    cut norm centres over the kept entries, f = gain (x - mu) + shift with mu the mean of x[kept]; then y also has the
    rows gain mu at `kept`.

    With K the kept and R the dropped entries and cov(x) + ridge = L L^T, L lower triangular, x_R is regressed on x_K
    by Y = L_RK L_KK^-1: the stored factor solves for every prefix. The rest are corrections of rank one: centring
    takes away the constant direction, Y <- Y - (Y 1) w^T with w = cov^-1 1 / (1^T cov^-1 1), and fitting without an
    intercept adds the means to the moments (Sherman-Morrison).

    Args:
        statistics: moments of x.
        site: whose.
        kept: (P,) int64, ascending.
        gain, shift: (D,) of the norm, None for 1 and 0.
        centred: whether the norm subtracts the mean of the kept entries.
        intercept: whether a constant is fitted too.
    """
    factor = statistics.factor(site, kept)
    mean, has_gain = statistics.mean(site).to(factor.dtype), gain is not None
    gain = torch.ones_like(mean) if gain is None else gain.to(factor.dtype)
    shift = torch.zeros_like(mean) if shift is None else shift.to(factor.dtype)
    rest = _others(kept, len(mean))
    triangle = factor[_span(kept)]
    matrix = torch.linalg.solve_triangular(triangle, factor[_span(rest)], upper=False, left=False)
    missing, features = gain * mean + shift, (gain * mean + shift)[kept]
    rows, weighting = rest, None
    if centred:
        weighting = _solve(triangle, torch.ones_like(features))
        weighting = weighting / weighting.sum()
        rows, matrix = torch.arange(len(mean)), _centred(matrix, kept, rest, weighting)
        missing[kept] = gain[kept] * mean[kept].mean()
        features = features - missing[kept]
    # A feature of gain 0 says nothing.
    inverse = torch.where(gain[kept].abs() > 1e-6 * gain.abs().max(), 1 / gain[kept], 0)
    if has_gain:
        matrix.mul_(gain[rows, None]).mul_(inverse)
    missing = missing[rows]
    if intercept:
        return Fit(kept, rows, matrix, missing - matrix @ features)
    scaled = inverse * features
    direction = _solve(triangle, scaled)
    if weighting is not None:
        # Along the constant direction the centred features do not vary: there only the ridge holds.
        floor = statistics.ridge * triangle.square().sum(1).mean()
        direction = direction - weighting * direction.sum() + scaled.mean() / floor
    direction = inverse * direction
    gap = missing - matrix @ features
    return Fit(kept, rows, matrix.addr_(gap, direction / (1 + features @ direction)), None)


def _others(kept: torch.Tensor, size: int) -> torch.Tensor:
    """The positions that are not kept, ascending."""
    dropped = torch.ones(size, dtype=torch.bool)
    dropped[kept] = False
    return dropped.nonzero().flatten()


def _centred(matrix: torch.Tensor, kept: torch.Tensor, rest: torch.Tensor, weighting: torch.Tensor) -> torch.Tensor:
    """The fit of the dropped entries (R, P) without the constant direction, with rows for what centring took from the
    kept ones: (D, P)."""
    made = matrix.new_empty(len(kept) + len(rest), len(kept))
    made[rest] = matrix - torch.outer(matrix.sum(1), weighting)
    made[kept] = 1 / len(kept) - weighting
    return made


def _solve(triangle: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """(L L^T)^-1 v, without the copy of L that `cholesky_solve` makes."""
    half = torch.linalg.solve_triangular(triangle, vector[:, None], upper=False)
    return torch.linalg.solve_triangular(triangle.mT, half, upper=True)[:, 0]
