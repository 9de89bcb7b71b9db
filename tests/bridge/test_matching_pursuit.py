import pytest
import torch

from cbd_trl.bridge.transplant import matching_pursuit


def _drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _naive(target: torch.Tensor, atoms: torch.Tensor, count: int) -> torch.Tensor:
    """The fit of one target: the same by the book, with a least squares from nothing at each step."""
    chosen: list[int] = []
    rest = target
    for _ in range(count):
        likeness = (atoms @ rest).abs() / atoms.norm(dim=1)
        likeness[chosen] = -1
        chosen.append(int(likeness.argmax()))
        coefficient = torch.linalg.lstsq(atoms[chosen].T, target[:, None]).solution[:, 0]
        rest = target - coefficient @ atoms[chosen]
    return target - rest


def test_it_finds_the_sums_that_targets_are() -> None:
    atoms = _drawn(40, 64)
    which = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i))[:3] for i in range(300)])
    coefficients = 1 + _drawn(300, 3, seed=1).abs()
    chosen, found = matching_pursuit((coefficients[:, :, None] * atoms[which]).sum(1), atoms, 8)
    dense = torch.zeros(300, 40, dtype=torch.float64).scatter_(1, chosen, found)
    assert torch.allclose(dense, torch.zeros_like(dense).scatter_(1, which, coefficients), atol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_it_is_the_naive_one(count: int) -> None:
    targets, atoms = _drawn(7, 10), _drawn(30, 10, seed=1) * torch.arange(1, 31)[:, None]
    chosen, coefficient = matching_pursuit(targets, atoms, count)
    assert chosen.shape == coefficient.shape == (7, count)
    fit = (coefficient[:, :, None] * atoms[chosen]).sum(1)
    assert torch.allclose(fit, torch.stack([_naive(target, atoms, count) for target in targets]), atol=1e-9)


def test_no_more_atoms_than_there_are_or_than_say_anything() -> None:
    atoms = _drawn(3, 10)
    repeated = torch.cat([atoms, 2 * atoms, torch.zeros(1, 10, dtype=torch.float64)])
    targets = _drawn(5, 3, seed=1) @ atoms
    chosen, coefficient = matching_pursuit(targets, repeated, 64)
    assert chosen.shape == (5, 7) and coefficient.isfinite().all()
    assert torch.allclose((coefficient[:, :, None] * repeated[chosen]).sum(1), targets, atol=1e-9)
    assert ((coefficient.abs() > 1e-9).sum(1) <= 3).all()
