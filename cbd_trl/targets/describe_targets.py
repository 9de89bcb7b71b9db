"""What targets would be like, told without building one or reading a weight."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cbd_trl.architectures import Architecture
from cbd_trl.architectures.axes import dims_of, tensor_shape
from cbd_trl.chain.chain import Chain
from cbd_trl.surgery.weights import reader_keys
from cbd_trl.targets.request import Request, find_target, target_dtype


@dataclass(frozen=True)
class TargetSummary:
    """A target and what it costs to keep and to run.

    Args:
        asked: the size that was asked for; None where only config fields were.
        num_parameters: a tied table counted once.
        embedding_parameters: those of the token table, of an untied head and of learned positions.
        shape: config fields of the family.
        operator: what makes its weights; "anchor" where it is one.
        alpha: share of the lower anchor, None where nothing is mixed.
        anchors: names of the upper and the lower one, or of the one that it is.
        dtype: of the weights and of the cache, such as "bfloat16".
        weight_bytes: of the weights in memory and, but for headers of some kB, on disk.
        cache_bytes: of the key/value cache for each token of context and row; where attention slides over a window,
            for each token until that is full.
        flops: of a forward pass for each token, attention to the context aside: two for every weight of a matrix that
            is multiplied with, the head included whether tied or not, looking up embeddings not.
        attention_flops: more of them for every token of context that a token attends to: four for every channel of a
            query head in every layer. Norms, activations, biases and softmax count nothing.
        engine_limit: what runs differently outside of transformers (`Architecture.engine_limit`), or None.
    """

    asked: float | None
    num_parameters: int
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
    """What `from_chain` would make, before it is made: a dry run.

    Args:
        chain: a chain, its folder, or its Hub id; of the latter chain.json and config.json of the anchors are fetched.
        sizes: numbers of parameters; None for the one target that `config` asks for.
        config, operator, alpha, dtype, tolerance, revision, token: as `from_chain` takes them.

    Returns:
        One summary a size. With calibration text `from_chain` may choose another operator and alpha, never another
        shape.

    Raises:
        ValueError: a size, shape, operator or alpha that cannot be had; the message says what can.
    """
    requests = [Request(size, config, operator, alpha, tolerance) for size in ([None] if sizes is None else sizes)]
    if not isinstance(chain, Chain):
        chain = Chain.from_pretrained(chain, revision=revision, token=token, verify=False)
    return [_summary(chain, request, dtype) for request in requests]


def _summary(chain: Chain, request: Request, dtype: torch.dtype | str | None) -> TargetSummary:
    target = find_target(chain, request)
    architecture, kind = target.architecture, target_dtype(dtype, target.anchors[0])
    sizes, depth = architecture.sizes, architecture.depth
    return TargetSummary(
        asked=request.num_parameters,
        num_parameters=architecture.num_parameters,
        embedding_parameters=_embedding_parameters(architecture),
        shape=architecture.shape,
        operator=target.operator,
        alpha=target.alpha,
        anchors=tuple(anchor.name for anchor in target.anchors),
        dtype=str(kind).removeprefix("torch."),
        weight_bytes=architecture.num_parameters * kind.itemsize,
        cache_bytes=2 * depth * sizes["group"] * sizes["dim"] * kind.itemsize,
        flops=2 * multiplied_weights(architecture),
        attention_flops=4 * depth * sizes["group"] * sizes["query"] * sizes["dim"],
        engine_limit=architecture.engine_limit(),
    )


def _embedding_parameters(architecture: Architecture) -> int:
    return sum(
        math.prod(tensor_shape(axes, architecture.sizes))
        for axes in architecture.tensors.values()
        if {"vocab", "position"} & set(dims_of(axes))
    )


def multiplied_weights(architecture: Architecture) -> int:
    """Weights of all matrices that a stream is multiplied with, a tied table among them."""
    readers = {reader for site in architecture.sites for reader in site.readers}
    keys = [reader_keys(reader, architecture.tensors, architecture)[0] for reader in readers]
    return sum(math.prod(tensor_shape(architecture.tensors[key], architecture.sizes)) for key in keys)
