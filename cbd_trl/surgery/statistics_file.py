"""Statistics on disk: a factor of the second moments in few bits, read site by site."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cbd_trl.surgery.statistics import Statistics, deviations, factorize, pack, packed_bytes, unpack
from cbd_trl.utils.progress import Progress
from cbd_trl.utils.tensor_files import TensorFile, save_tensors
from cbd_trl.utils.untrusted import parse_json, shown

FORMAT_VERSION = "3"
_MARK = "cbd_trl_statistics"
# Sites whose vectors stay mapped, so that what a layer reads again and again is mapped once.
_MAPPED = 8
_VECTORS = ("mean", "variances", "prefix_squares", "diagonal", "scales")


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Write statistics to a safetensors file, about 0.15 to 0.3 times as large as the model in bfloat16."""
    tensors = {}
    for site in Progress("Factorizing the statistics", statistics.means):
        factor = statistics.factor(site, torch.arange(len(statistics.means[site])))
        mean, squares = statistics.mean(site), statistics.variances(site)
        factor = factor / deviations(mean, squares)[:, None]
        codes, scales = pack(factor)
        vectors = (mean, squares, statistics.prefix_squares(site), factor.diagonal(), scales)
        tensors[f"{site}.codes"] = codes
        tensors[f"{site}.vectors"] = torch.stack([vector.float() for vector in vectors])
    tensors |= {f"{norm}.squares": squares.contiguous() for norm, squares in statistics.squares.items()}
    metadata = {_MARK: FORMAT_VERSION, "tokens": json.dumps(statistics.tokens), "ridge": json.dumps(statistics.ridge)}
    save_tensors(tensors, path, metadata)


class StoredStatistics:
    """Moments of a file written by `save_statistics`; nothing but a few vectors is kept in memory.

    Args:
        path: the file.

    Raises:
        ValueError: it is no safetensors file or holds no statistics of this version.
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
        """Refuse statistics of another model, before a number of them is used.

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
        for name, model in wanted.items():
            found = self._tensors.dtype(name), self._tensors.shape(name)
            if found != model:
                raise ValueError(
                    f"{self.path} holds {name} as {found[0]} of shape {found[1]}, but the model's is {model[0]} of "
                    f"shape {model[1]}: it was not written for this model. Build the chain again."
                )

    @property
    def sites(self) -> set[str]:
        """The sites there are."""
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
        """E[x], (D,) float32."""
        return self._vector(site, "mean")

    def variances(self, site: str) -> torch.Tensor:
        """E[x_i^2], (D,) float32, at a site or an output norm."""
        squares = f"{site}.squares"
        return self._tensors[squares] if squares in self._tensors else self._vector(site, "variances")

    def prefix_squares(self, site: str) -> torch.Tensor:
        """E[(x_1 + ... + x_i)^2] for every i, (D,) float32."""
        return self._vector(site, "prefix_squares")

    def second(self, site: str) -> torch.Tensor:
        """E[x x^T], (D, D) float32, as exact as the stored factor."""
        mean = self.mean(site)
        factor = self.factor(site, torch.arange(len(mean)))
        second = factor @ factor.T + torch.outer(mean, mean)
        second.diagonal().copy_(self.variances(site))
        return second

    def factor(self, site: str, kept: torch.Tensor) -> torch.Tensor:
        """L, (D, P) float32, with (cov(x) + ridge)[:, kept] = L L[kept]^T and L[kept] lower triangular.

        Where `kept` is a prefix that is a part of what is stored; else the moments are factorized anew.
        """
        size = len(kept)
        if int(kept[-1]) != size - 1:
            return factorize(self.mean(site).double(), self.second(site).double(), kept, self.ridge).float()
        units = deviations(self.mean(site), self.variances(site)).float()
        factor = unpack(self._tensor(site, "codes"), self._vector(site, "scales"), units, size)
        factor.diagonal().copy_(self._vector(site, "diagonal")[:size] * units[:size])
        return factor


def _number(path: Path, metadata: Mapping[str, str], name: str) -> Any:
    """One of the numbers in the metadata, none of which is negative."""
    text = metadata.get(name, "null")
    try:
        value = parse_json(text.encode())
    except ValueError:
        value = None
    if type(value) not in (int, float) or value < 0:
        raise ValueError(f"{path} has {name} = {shown(text)} in its metadata, no number. Build the chain again.")
    return value
