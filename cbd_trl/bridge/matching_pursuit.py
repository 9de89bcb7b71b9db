"""Orthogonal matching pursuit: vectors as sums of a few others.

Shapes: N targets, A atoms, K of them for each target, D width.
"""

import torch
from torch import Tensor

from cbd_trl.utils.progress import Progress

# Targets at a time: their correlations with every atom are held at once.
_BATCH = 256
# A new atom that is this much of itself outside the span of the earlier ones, or less, says nothing new.
_DEPENDENT = 1e-4


def matching_pursuit(target_ND: Tensor, atom_AD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The atoms that each target is written with, and how much of each.

    Atom by atom, the one whose direction the rest of the target has most of (Pati et al., 1993); the coefficients are
    those of the least squares on all that were chosen. The code of arXiv 2506.06607 goes by the inner product with the
    atom as it is, which prefers long atoms whatever their direction.

    Args:
        target_ND: (N, D), floating point.
        atom_AD: (A, D), same dtype.
        count: K; no more than A and D are used.

    Returns:
        which atoms, (N, K) int64, and their coefficients, (N, K): `(coefficient[:, :, None] * atom[chosen]).sum(1)` is
        the fit. A coefficient is 0 where fewer atoms say all.
    """
    count = min(count, *atom_AD.shape)
    direction = torch.nn.functional.normalize(atom_AD, dim=1)
    parts = [
        _pursue(part, atom_AD, direction, count) for part in Progress("Rebuilding embeddings", target_ND.split(_BATCH))
    ]
    return torch.cat([chosen for chosen, _ in parts]), torch.cat([coefficient for _, coefficient in parts])


def _pursue(target_ND: Tensor, atom_AD: Tensor, direction_AD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    rows = len(target_ND)
    each = torch.arange(rows, device=target_ND.device)
    chosen = torch.zeros(rows, count, dtype=torch.int64, device=target_ND.device)
    basis = target_ND.new_zeros(rows, count, target_ND.shape[1])
    # The chosen atoms in that basis, column by column: atom = basis^T factor.
    factor = torch.eye(count, dtype=target_ND.dtype, device=target_ND.device).repeat(rows, 1, 1)
    along = target_ND.new_zeros(rows, count)
    taken = torch.zeros(rows, len(atom_AD), dtype=torch.bool, device=target_ND.device)
    rest = target_ND.clone()
    for step in range(count):
        likeness = (rest @ direction_AD.T).abs().masked_fill_(taken, -1.0)
        best = likeness.argmax(1)
        chosen[:, step], taken[each, best] = best, True
        atom = atom_AD[best]
        earlier = basis[:, :step]
        # Twice: one pass leaves rounding errors that add up over the steps.
        new = atom
        for _ in range(2):
            new = new - torch.einsum("nk,nkd->nd", torch.einsum("nkd,nd->nk", earlier, new), earlier)
        length = new.norm(dim=1)
        useful = length > _DEPENDENT * atom.norm(dim=1)
        basis[:, step] = torch.where(useful, 1 / length, 0.0)[:, None] * new
        factor[:, :step, step] = torch.einsum("nkd,nd->nk", earlier, atom)
        factor[:, step, step] = torch.where(useful, length, 1.0)
        along[:, step] = torch.einsum("nd,nd->n", basis[:, step], rest)
        rest = rest - along[:, step, None] * basis[:, step]
    return chosen, torch.linalg.solve_triangular(factor, along[:, :, None], upper=True)[:, :, 0]
