"""Many targets from one chain in one pass: opened and checked once, files opened once a pair."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from cbd_trl.build.plan import anchor_name
from cbd_trl.chain.chain import Chain
from cbd_trl.targets.from_chain import calibration_tokens, check_replaceable, load_pair, make_model, save_model
from cbd_trl.targets.pair import Pair
from cbd_trl.targets.request import ANCHOR, Request, Target, find_target, target_dtype
from cbd_trl.utils.blocks import TokenBlocks
from cbd_trl.utils.progress import Progress


@dataclass(frozen=True)
class MadeTarget:
    """What became of one size.

    Args:
        asked: the number of parameters asked for.
        directory: the folder of the model.
        told: what it was made from, as `model.config.cbd_trl` says; None where it could not be made.
        kept: whether an earlier run had made it already.
        error: why it could not be made.
    """

    asked: float
    directory: Path
    told: dict[str, Any] | None = None
    kept: bool = False
    error: str | None = None


def make_targets(
    chain: str | Path | Chain,
    sizes: Sequence[float],
    output_dir: str | Path,
    *,
    config: Mapping[str, int] | None = None,
    operator: str = "nested",
    alpha: float | None = None,
    calibration_dataset: Dataset | None = None,
    dtype: torch.dtype | str | None = None,
    tolerance: float = 0.03,
    revision: str | None = None,
    token: str | None = None,
) -> list[MadeTarget]:
    """Make and save a model for each of several sizes.

    Run again, it keeps what it finished with the same arguments from the same chain and makes the rest.

    Args:
        chain: a chain, its folder, or its Hub id.
        sizes: numbers of parameters.
        output_dir: gets a folder for each size, named as anchors are: "100M"; where two sizes would share a name,
            after the whole number.
        config, operator, alpha, calibration_dataset, dtype, tolerance, revision, token: as `from_chain` takes them.

    Returns:
        One entry a size, in their order. A size that cannot be made has its error there; the others are made.

    Raises:
        ValueError: no sizes, one of them twice, or arguments that make no sense for any chain.
    """
    requests = {size: Request(size, config, operator, alpha, tolerance) for size in sizes}
    if not requests or len(requests) < len(sizes):
        raise ValueError(f"sizes must name different numbers of parameters, at least one, got {list(sizes)}.")
    if not isinstance(chain, Chain):
        chain = Chain.from_pretrained(chain, revision=revision, token=token)
    folder = Path(output_dir).expanduser().resolve()
    maker = _Maker(chain, dtype, calibration_dataset)
    made = {}
    # Largest first, so that the files of each pair of anchors are opened once.
    order = sorted(_directories(folder, sizes), key=lambda place: -place[0])
    for size, directory in Progress("Making models", order, unit="models"):
        try:
            made[size] = maker.make(requests[size], directory)
        except (ValueError, OSError, RuntimeError) as error:
            made[size] = MadeTarget(size, directory, error=str(error))
    return [made[size] for size in sizes]


def _directories(folder: Path, sizes: Sequence[float]) -> Iterator[tuple[float, Path]]:
    names = Counter(anchor_name(round(size)) for size in sizes)
    for size in sizes:
        name = anchor_name(round(size))
        yield size, folder / (name if names[name] == 1 else str(round(size)))


class _Maker:
    """Makes one target after another, keeping what the headers of the last pair's files say."""

    def __init__(self, chain: Chain, dtype: torch.dtype | str | None, dataset: Dataset | None) -> None:
        self._chain, self._dtype, self._dataset = chain, dtype, dataset
        self._tokens: TokenBlocks | None = None
        self._names: tuple[str, ...] = ()
        self._pair: Pair | None = None

    def make(self, request: Request, directory: Path) -> MadeTarget:
        assert request.num_parameters is not None
        check_replaceable(directory)
        target = find_target(self._chain, request)
        tokens = self._calibration(target)
        asked = self._asked(request, target, tokens)
        told = _made_before(directory, asked)
        if told is not None:
            return MadeTarget(request.num_parameters, directory, told, kept=True)
        model = make_model(self._chain, request, target, tokens, self._dtype, self._loaded(target))
        model.config.cbd_trl["asked"] = asked
        save_model(model, self._chain, directory)
        return MadeTarget(request.num_parameters, directory, model.config.cbd_trl)

    def _calibration(self, target: Target) -> TokenBlocks | None:
        if self._dataset is None or target.operator == ANCHOR:
            return None
        if self._tokens is None:
            self._tokens = calibration_tokens(target, self._dataset)
        return self._tokens

    def _loaded(self, target: Target) -> Pair | None:
        if target.operator == ANCHOR:
            return None
        names = tuple(anchor.name for anchor in target.anchors)
        if names != self._names:
            self._pair, self._names = load_pair(*target.anchors), names
        return self._pair

    def _asked(self, request: Request, target: Target, tokens: TokenBlocks | None) -> dict[str, Any]:
        """All that decides what is made, as JSON keeps it."""
        assert request.num_parameters is not None
        text = None if tokens is None else hashlib.sha256(tokens.input_ids.numpy().tobytes()).hexdigest()
        return {
            "chain": self._chain.checksum,
            "num_parameters": float(request.num_parameters),
            "config": None if request.config is None else dict(request.config),
            "operator": request.operator,
            "alpha": request.alpha,
            "tolerance": request.tolerance,
            "dtype": str(target_dtype(self._dtype, target.anchors[0])),
            "calibration": text,
        }


def _made_before(directory: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the model that lies there was made from, if it is the one that is asked for."""
    config = directory / "config.json"
    if not config.is_file():
        return None
    told: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))["cbd_trl"]
    return told if told.get("asked") == asked else None
