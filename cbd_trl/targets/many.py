"""Many targets of one chain: made in one pass (`make_targets`), or described beforehand (`describe_targets`)."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from cbd_trl.architectures import Architecture
from cbd_trl.architectures.axes import dims_of, tensor_shape
from cbd_trl.chain.chain import Chain
from cbd_trl.shapes.budget import FlopCount
from cbd_trl.shapes.storage import Memory, attention_layers, cache_numbers
from cbd_trl.targets.calibrate import calibration_tokens
from cbd_trl.targets.from_chain import choose_shape, load_pair, make_model
from cbd_trl.targets.limits import Limits
from cbd_trl.targets.operators import Pair
from cbd_trl.targets.request import ANCHOR, Request, Target, find_target, find_targets, target_dtype, within_limits
from cbd_trl.targets.saving import check_replaceable, save_model
from cbd_trl.targets.shape_search import score_by_statistics
from cbd_trl.utils.blocks import TokenBlocks
from cbd_trl.utils.formatting import anchor_name
from cbd_trl.utils.progress import Progress


@dataclass(frozen=True)
class MadeTarget:
    """The result for one size of `make_targets`.

    Args:
        requested: number of parameters.
        directory: the folder of the model.
        provenance: what it was made from (`model.config.cbd_trl`); None where it could not be made.
        kept: whether an earlier run had made it already.
        error: why it could not be made.
    """

    requested: float
    directory: Path
    provenance: dict[str, Any] | None = None
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
    shape_search: int | None = None,
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
        config: config fields to fix, as in `from_chain`.
        operator: the rule that makes the weights, as in `from_chain`.
        alpha: weight of the lower anchor where the operator mixes, as in `from_chain`.
        calibration_dataset: text on which blocks and alpha are chosen, as in `from_chain`.
        dtype: of the result, as in `from_chain`.
        tolerance: largest relative distance from a size, as in `from_chain`.
        shape_search: number of shapes to compare at each size, as in `from_chain`.
        revision: of a chain on the Hub.
        token: for a chain on the Hub that is private or gated.

    Returns:
        One entry a size, in their order. A size that cannot be made has its error there; the others are made.

    Raises:
        ValueError: no sizes, one of them twice, or arguments that are invalid for any chain.
    """
    if isinstance(sizes, int | float | str):
        raise TypeError(f"sizes is {sizes!r}, but must be a list of numbers of parameters: sizes=[{sizes!r}].")
    requests = {size: Request(size, config, operator, alpha, tolerance, shape_search) for size in sizes}
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


@dataclass(frozen=True)
class TargetSummary:
    """A target and what it costs to keep and to run.

    Args:
        requested: number of parameters, None where config fields or limits alone were requested.
        num_parameters: a tied table counted once.
        active_parameters: those that a token is computed with: all, but of a mixture of experts.
        embedding_parameters: those of the token table, of an untied head and of learned positions.
        shape: config fields of the family.
        operator: what makes its weights; "anchor" where it is one.
        alpha: share of the lower anchor, None where nothing is mixed.
        anchors: names of the upper and the lower one, or of the one that it is.
        dtype: of the weights and of the cache, such as "bfloat16".
        weight_bytes: of the weights in memory and, but for headers of some kB, on disk.
        cache_bytes: of the key/value cache for each token of context and row; where attention slides over a window,
            for each token until that is full; states of a layer that do not grow with the context not.
        flops: of a forward pass for each token, attention to the context aside: two for every weight of a matrix that
            is multiplied with, the head included whether tied or not, looking up embeddings not. Short convolutions
            and the recurrence of linear attention count nothing.
        attention_flops: more of them for every token of context that a token attends to: four for every channel of a
            query head in every layer with attention. Norms, activations, biases and softmax count nothing.
        engine_limit: what runs differently outside of transformers (`Architecture.engine_limit`), or None.
        score: with a search of shapes the share of what the lower anchor loses (`LostEnergy`), or None.
        storage: with a limit of memory, how the weights are kept; None without.
        stored_bytes: of the weights in it.
        context_length: tokens that the cache holds there.
        context_bytes: of the cache of so many, keys and values in 16 bits, windows and states counted as they are.
    """

    requested: float | None
    num_parameters: int
    active_parameters: int
    embedding_parameters: int
    shape: dict[str, int]
    operator: str
    alpha: float | None
    anchors: tuple[str, ...]
    dtype: str
    weight_bytes: int
    cache_bytes: int
    flops: int
    attention_flops: int
    engine_limit: str | None = None
    score: float | None = None
    storage: str | None = None
    stored_bytes: int = 0
    context_length: int = 0
    context_bytes: int = 0

    @property
    def other_parameters(self) -> int:
        """All but those of the embedding: of the layers and the final norm."""
        return self.num_parameters - self.embedding_parameters


def describe_targets(
    chain: str | Path | Chain,
    sizes: Sequence[float] | None = None,
    *,
    config: Mapping[str, int] | None = None,
    operator: str = "nested",
    alpha: float | None = None,
    dtype: torch.dtype | str | None = None,
    tolerance: float = 0.03,
    revision: str | None = None,
    token: str | None = None,
) -> list[TargetSummary]:
    """Describe what `from_chain` would make, before it is made: a dry run.

    Args:
        chain: a chain, its folder, or its Hub id; of the latter chain.json and config.json of the anchors are fetched.
        sizes: numbers of parameters; None for the one target of `config`.
        config: config fields to fix, as in `from_chain`.
        operator: the rule that makes the weights, as in `from_chain`.
        alpha: weight of the lower anchor where the operator mixes, as in `from_chain`.
        dtype: of the result, as in `from_chain`.
        tolerance: largest relative distance from a size, as in `from_chain`.
        revision: of a chain on the Hub.
        token: for a chain on the Hub that is private or gated.

    Returns:
        One summary a size. With calibration text `from_chain` may choose another operator and alpha, never another
        shape.

    Raises:
        ValueError: a size, shape, operator or alpha that is out of reach; the message names what is not.
    """
    requests = [Request(size, config, operator, alpha, tolerance) for size in ([None] if sizes is None else sizes)]
    if not isinstance(chain, Chain):
        chain = Chain.from_pretrained(chain, revision=revision, token=token, verify=False)
    return [_summary(request, find_target(chain, request), dtype) for request in requests]


def describe_shapes(
    chain: str | Path | Chain,
    num_parameters: float,
    shape_search: int,
    *,
    operator: str = "nested",
    alpha: float | None = None,
    dtype: torch.dtype | str | None = None,
    tolerance: float = 0.03,
    revision: str | None = None,
    token: str | None = None,
) -> list[TargetSummary]:
    """Describe the shapes of one size that `from_chain(..., shape_search=...)` compares without data: a dry run.

    Args:
        chain: a chain, its folder, or its Hub id; of the latter the statistics of an anchor are fetched, too.
        num_parameters: size wanted.
        shape_search: number of shapes to compare.
        operator: the rule that makes the weights, as in `from_chain`.
        alpha: weight of the lower anchor where the operator mixes, as in `from_chain`.
        dtype: of the result, as in `from_chain`.
        tolerance: largest relative distance from the size, as in `from_chain`.
        revision: of a chain on the Hub.
        token: for a chain on the Hub that is private or gated.

    Returns:
        A summary a shape, the best first: the one that is made without calibration text. At an anchor's size that
        anchor alone.

    Raises:
        ValueError: a size, operator or alpha that is out of reach, or a number of shapes below 2.
    """
    request = Request(num_parameters, None, operator, alpha, tolerance, shape_search)
    if not isinstance(chain, Chain):
        chain = Chain.from_pretrained(chain, revision=revision, token=token, verify=False)
    scored = score_by_statistics(find_targets(chain, request), request)
    return [_summary(request, target, dtype) for target in scored]


def describe_within(
    chain: str | Path | Chain,
    limits: Limits,
    shape_search: int | None = None,
    *,
    operator: str = "nested",
    alpha: float | None = None,
    dtype: torch.dtype | str | None = None,
    tolerance: float = 0.03,
    revision: str | None = None,
    token: str | None = None,
) -> list[TargetSummary]:
    """Describe what `from_chain(..., memory_limit=...)` would make: a dry run.

    Args:
        chain: a chain, its folder, or its Hub id.
        limits: as `read_limits` reads them.
        shape_search: number of shapes to compare, without data; None: that on the line alone.
        operator: the rule that makes the weights, as in `from_chain`.
        alpha: weight of the lower anchor where the operator mixes, as in `from_chain`.
        dtype: of the result, as in `from_chain`.
        tolerance: as in `from_chain`.
        revision: of a chain on the Hub.
        token: for a chain on the Hub that is private or gated.

    Returns:
        A summary a shape, the best first: the one that is made without calibration text.

    Raises:
        ValueError: no model of the chain keeps the limits, or an argument is invalid.
    """
    request = Request(None, None, operator, alpha, tolerance, shape_search, limits=limits)
    if not isinstance(chain, Chain):
        chain = Chain.from_pretrained(chain, revision=revision, token=token, verify=False)
    request = within_limits(chain, request)
    targets = find_targets(chain, request)
    found = targets if shape_search is None else score_by_statistics(targets, request)
    return [_summary(request, target, dtype) for target in found]


def multiplied_weights(architecture: Architecture) -> int:
    """Count the weights of all matrices that a hidden state is multiplied with, a tied table among them; of experts
    those that a token is sent to."""
    return FlopCount.of(architecture) // FlopCount.price


def _directories(folder: Path, sizes: Sequence[float]) -> Iterator[tuple[float, Path]]:
    names = Counter(anchor_name(round(size)) for size in sizes)
    for size in sizes:
        name = anchor_name(round(size))
        yield size, folder / (name if names[name] == 1 else str(round(size)))


class _Maker:
    """Makes one target after another, keeping the last pair of anchors open."""

    def __init__(self, chain: Chain, dtype: torch.dtype | str | None, dataset: Dataset | None) -> None:
        self._chain, self._dtype, self._dataset = chain, dtype, dataset
        self._tokens: TokenBlocks | None = None
        self._names: tuple[str, ...] = ()
        self._pair: Pair | None = None

    def make(self, request: Request, directory: Path) -> MadeTarget:
        assert request.size is not None
        check_replaceable(directory)
        targets = find_targets(self._chain, request)
        tokens = self._calibration(targets[0])
        record = self._record(request, targets[0], tokens)
        provenance = _made_before(directory, record)
        if provenance is not None:
            return MadeTarget(request.size, directory, provenance, kept=True)
        pair = self._loaded(targets[0])
        target = choose_shape(targets, request, tokens, pair)
        model = make_model(self._chain, request, target, tokens, self._dtype, pair)
        model.config.cbd_trl["request"] = record
        save_model(model, self._chain, directory)
        return MadeTarget(request.size, directory, model.config.cbd_trl)

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

    def _record(self, request: Request, target: Target, tokens: TokenBlocks | None) -> dict[str, Any]:
        """Collect all that decides what is made, as JSON keeps it."""
        assert request.size is not None
        text = None if tokens is None else hashlib.sha256(tokens.input_ids.numpy().tobytes()).hexdigest()
        return {
            "chain": self._chain.checksum,
            "num_parameters": float(request.size),
            "config": None if request.config is None else dict(request.config),
            "operator": request.operator,
            "alpha": request.alpha,
            "tolerance": request.tolerance,
            "shape_search": request.shape_search,
            "dtype": str(target_dtype(self._dtype, target.anchors[0])),
            "calibration": text,
        }


def _made_before(directory: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read what the model in a folder was made from, if it is the requested one."""
    config = directory / "config.json"
    if not config.is_file():
        return None
    provenance: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))["cbd_trl"]
    return provenance if provenance.get("request") == record else None


def _summary(request: Request, target: Target, dtype: torch.dtype | str | None) -> TargetSummary:
    architecture, kind = target.architecture, target_dtype(dtype, target.anchors[0])
    sizes = architecture.sizes
    attending = len(attention_layers(architecture))
    return TargetSummary(
        requested=request.size if request.limits is None else None,
        num_parameters=architecture.num_parameters,
        active_parameters=architecture.num_active_parameters,
        embedding_parameters=_embedding_parameters(architecture),
        shape=architecture.shape,
        operator=target.operator,
        alpha=target.alpha,
        anchors=tuple(anchor.name for anchor in target.anchors),
        dtype=str(kind).removeprefix("torch."),
        weight_bytes=architecture.num_parameters * kind.itemsize,
        cache_bytes=attending * cache_numbers(sizes) * kind.itemsize,
        flops=FlopCount.of(architecture),
        attention_flops=4 * attending * sizes["group"] * sizes["query"] * sizes["dim"],
        engine_limit=architecture.engine_limit(),
        score=target.score,
        **_kept(architecture, request.limits),
    )


def _kept(architecture: Architecture, limits: Limits | None) -> dict[str, Any]:
    if limits is None or limits.memory_limit is None:
        return {}
    weights, cache = Memory.of(architecture, limits.storage, limits.context_length)
    found = {"storage": limits.storage, "context_length": limits.context_length}
    return {**found, "stored_bytes": weights, "context_bytes": cache}


def _embedding_parameters(architecture: Architecture) -> int:
    return sum(
        math.prod(tensor_shape(axes, architecture.sizes))
        for axes in architecture.tensors.values()
        if {"vocab", "position"} & set(dims_of(axes))
    )
