"""Keep statistics on disk: a factor of the second moments in few bits, read site by site."""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from cbd_trl.architectures import Architecture
from cbd_trl.architectures.axes import axis_length
from cbd_trl.surgery.statistics import Statistics, cholesky, correlations, deviations, factorize, prefix_squares
from cbd_trl.utils.progress import Progress
from cbd_trl.utils.tensor_files import TensorFile, write_tensors
from cbd_trl.utils.untrusted import parse_json, shown

FORMAT_VERSION = "3"
_MARK = "cbd_trl_statistics"
# Sites whose vectors stay mapped, so that what a layer reads again and again is mapped once.
_MAPPED = 8
BITS = 6
_PANEL = 32
_OFFSET = 2 ** (BITS - 1)
# An entry is its step to this power: of 1, 1.5 and 2 the one that costs the fits least (SmolLM2-135M).
_POWER = 1.5
_STEPS = torch.arange(_OFFSET * 2, dtype=torch.float32, device="cpu") - _OFFSET
# What a byte's low bits stand for, in units of the column's scale; looked up by whole bytes, the high bits in them.
_ENTRIES = (_STEPS * _STEPS.abs() ** (_POWER - 1)).repeat(2 ** (8 - BITS))
_VECTORS = ("mean", "variances", "prefix_squares", "diagonal", "scales")


def save_statistics(parts: Iterable[Statistics], architecture: Architecture, path: Path) -> None:
    """Write statistics to a safetensors file, about 0.15 to 0.3 times as large as the model in bfloat16.

    Site by site: in memory are the second moments of one part, and what `FACTORIZING` counts.

    Args:
        parts: of all sites and output norms together, such as those of `collect_in_groups`; each is let go of once it
            is written.
        architecture: of their model.
        path: of the file.
    """
    sizes = {site.name: axis_length(site.axis, architecture.sizes) for site in architecture.measured_sites}
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for site, size in sizes.items():
        entries[f"{site}.codes"] = torch.uint8, (packed_bytes(size),)
        entries[f"{site}.vectors"] = torch.float32, (len(_VECTORS), size)
    for norm in architecture.cut_output_norms:
        entries[f"{norm.name}.squares"] = torch.float32, (axis_length(norm.axis, architecture.sizes),)
    parts = iter(parts)
    first = [next(parts)]
    metadata = {_MARK: FORMAT_VERSION, "tokens": json.dumps(first[0].tokens), "ridge": json.dumps(first[0].ridge)}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        # A part that a name stood for would stay in memory while the next one is collected.
        yield from _stored_tensors(first.pop())
        while part := [*islice(parts, 1)]:
            yield from _stored_tensors(part.pop())

    write_tensors(path, entries, tensors(), metadata)


def _stored_tensors(statistics: Statistics) -> Iterator[tuple[str, torch.Tensor]]:
    for site in Progress("Factorizing the statistics", statistics.means):
        mean, second = statistics.means[site], statistics.seconds[site]
        squares = second.diagonal().cpu()
        deviation = deviations(mean, squares)
        prefixes = prefix_squares(second)
        factor = cholesky(correlations(mean, second, deviation.to(second)), statistics.ridge)
        codes, scales = pack(factor)
        vectors = (mean, squares, prefixes, factor.diagonal().cpu(), scales.cpu())
        yield f"{site}.codes", codes
        yield f"{site}.vectors", torch.stack([vector.float() for vector in vectors])
    for norm in statistics.squares.keys() - statistics.means.keys():
        yield f"{norm}.squares", statistics.squares[norm]


class StoredStatistics:
    """Moments of a file written by `save_statistics`; nothing but a few vectors is kept in memory.

    Args:
        path: the file.

    Raises:
        ValueError: it is not a safetensors file, or its statistics are of another version.
    """

    def __init__(self, path: Path) -> None:
        self._tensors = TensorFile(path)
        metadata = self._tensors.metadata
        if metadata.get(_MARK) != FORMAT_VERSION:
            raise ValueError(
                f"{path} holds no calibration statistics of version {FORMAT_VERSION} (found {metadata.get(_MARK)!r}). "
                "Build the chain again with this version of cbd_trl."
            )
        self.path = path
        self.tokens, self.ridge = (_number(path, metadata, name) for name in ("tokens", "ridge"))
        self._vectors = functools.lru_cache(maxsize=_MAPPED)(lambda site: self._tensor(site, "vectors"))

    def check(self, sizes: Mapping[str, int], norms: Mapping[str, int]) -> None:
        """Check that the statistics are of this model, before a number of them is used.

        Args:
            sizes: {site: D} that the model has.
            norms: {output norm: D}.

        Raises:
            ValueError: a tensor is missing, or of another shape or dtype.
        """
        wanted: dict[str, tuple[str, tuple[int, ...]]] = {
            self._name(site, "codes"): ("U8", (packed_bytes(size),)) for site, size in sizes.items()
        }
        wanted |= {self._name(site, "vectors"): ("F32", (len(_VECTORS), size)) for site, size in sizes.items()}
        wanted |= {self._name(norm, "squares"): ("F32", (size,)) for norm, size in norms.items()}
        for name, expected in wanted.items():
            found = self._tensors.dtype(name), self._tensors.shape(name)
            if found != expected:
                raise ValueError(
                    f"{self.path} holds {name} as {found[0]} of shape {found[1]}, but the model's is {expected[0]} of "
                    f"shape {expected[1]}: it was not written for this model. Build the chain again."
                )

    @property
    def sites(self) -> set[str]:
        """The sites that it has moments of."""
        return {name.removesuffix(".codes") for name in self._tensors if name.endswith(".codes")}

    def _tensor(self, site: str, kind: str) -> torch.Tensor:
        return self._tensors[self._name(site, kind)]

    def _name(self, site: str, kind: str) -> str:
        name = f"{site}.{kind}"
        if name not in self._tensors:
            raise ValueError(f"{self.path} lacks {name}: it was not written for this model. Build the chain again.")
        return name

    def _vector(self, site: str, name: str) -> torch.Tensor:
        return self._vectors(site)[_VECTORS.index(name)]

    def mean(self, site: str) -> torch.Tensor:
        """Read E[x], (D,) float32."""
        return self._vector(site, "mean")

    def variances(self, site: str) -> torch.Tensor:
        """Read E[x_i^2], (D,) float32, at a site or an output norm."""
        squares = f"{site}.squares"
        return self._tensors[squares] if squares in self._tensors else self._vector(site, "variances")

    def prefix_squares(self, site: str) -> torch.Tensor:
        """Read E[(x_1 + ... + x_i)^2] for every i, (D,) float32."""
        return self._vector(site, "prefix_squares")

    def second(self, site: str) -> torch.Tensor:
        """Compute E[x x^T], (D, D) float32, as exact as the stored factor."""
        mean = self.mean(site)
        factor = self.factor(site, torch.arange(len(mean)))
        second = factor @ factor.T + torch.outer(mean, mean)
        second.diagonal().copy_(self.variances(site))
        return second

    def factor(self, site: str, kept: torch.Tensor) -> torch.Tensor:
        """Read L, (D, P) float32, with (cov(x) + ridge)[:, kept] = L L[kept]^T and L[kept] lower triangular.

        Where `kept` is a prefix that is a part of what is stored; else the moments are factorized anew.
        """
        size = len(kept)
        if int(kept[-1]) != size - 1:
            return factorize(self.mean(site).double(), self.second(site).double(), kept, self.ridge).float()
        units = deviations(self.mean(site), self.variances(site)).float()
        factor = unpack(self._tensor(site, "codes"), self._vector(site, "scales"), units, size)
        factor.diagonal().copy_(self._vector(site, "diagonal")[:size] * units[:size])
        return factor


def pack(factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack a lower triangular (D, D) matrix into few bits.

    Returns:
        uint8 codes of what is below the diagonal, panel by panel of 32 columns, and the columns' scales, (D,) float32.
    """
    largest, codes, scales = _OFFSET - 1, [], []
    for start in range(0, len(factor), _PANEL):
        below = factor[start:, start : start + _PANEL].tril(-1)
        sizes = below.abs()
        scale = (sizes.amax(0) / largest**_POWER).float()
        ratios = sizes / scale.clamp(min=torch.finfo(torch.float32).tiny)
        steps = ratios.pow(1 / _POWER).round().clamp(max=largest) * below.sign()
        codes.append(_pack((steps + _OFFSET).to(torch.uint8)))
        scales.append(scale)
    return torch.cat(codes), torch.cat(scales)


def unpack(codes: torch.Tensor, scales: torch.Tensor, units: torch.Tensor, columns: int) -> torch.Tensor:
    """Unpack the leading columns, without the diagonal, row i times units[i]: (D, columns) float32.

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
    """Count the bytes of the codes of a (size, size) factor."""
    return sum(_packed_length((size - start) * min(_PANEL, size - start)) for start in range(0, size, _PANEL))


def _number(path: Path, metadata: Mapping[str, str], name: str) -> Any:
    """Read a number from the metadata, none of which is negative."""
    text = metadata.get(name, "null")
    try:
        value = parse_json(text.encode())
    except ValueError:
        value = None
    if type(value) not in (int, float) or value < 0:
        raise ValueError(
            f"{path} has {name} = {shown(text)} in its metadata, and must have a number of at least 0. Build the "
            "chain again."
        )
    return value


def _packed_length(count: int) -> int:
    return 3 * -(-count // 4)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack four codes into three bytes: the two free bits of each of the first three hold the fourth."""
    codes = codes.flatten()
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % 4)).view(4, -1)
    return torch.stack([codes[i] | (codes[3] >> 2 * i & 3) << BITS for i in range(3)]).flatten()


def _unpack(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Invert `_pack`, as entries in units of their column's scale, float32."""
    parts = packed.view(3, -1)
    high = parts >> BITS
    codes = torch.cat([packed, high[0] | high[1] << 2 | high[2] << 4])[:count]
    return _ENTRIES.index_select(0, codes.int())
