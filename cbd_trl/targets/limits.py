"""What a device allows: memory for weights and cache, FLOPs a token."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from cbd_trl.architectures import Architecture
from cbd_trl.architectures.axes import Sizes
from cbd_trl.shapes.budget import FlopCount
from cbd_trl.shapes.largest import Share
from cbd_trl.shapes.storage import STORAGES, Memory
from cbd_trl.utils.formatting import did_you_mean, format_bytes, format_count, parse_bytes


@dataclass(frozen=True)
class Limits:
    """Limits that a target is to keep, one at least.

    Args:
        memory_limit: bytes of weights and cache.
        context_length: tokens in the cache, of one row.
        storage: format of the weights, a row of `STORAGES`.
        flops_limit: of a forward pass for each token, attention to the context aside.
    """

    memory_limit: int | None = None
    context_length: int = 1
    storage: str = "bf16"
    flops_limit: float | None = None

    def share(self, upper: Architecture) -> Share:
        """Make the function that computes what share a cut of an architecture takes of the limit that it fills most.

        Args:
            upper: what layers are taken from.
        """
        memory = Memory(upper, self.storage, self.context_length)
        flops = FlopCount(upper)

        def share(layers: Sequence[int], sizes: Sizes) -> float:
            shares = []
            if self.memory_limit is not None:
                shares.append(memory(layers, sizes) / self.memory_limit)
            if self.flops_limit is not None:
                shares.append(flops(layers, sizes) / self.flops_limit)
            return max(shares)

        return share

    def keeps(self, architecture: Architecture) -> bool:
        """Check whether an architecture as it is keeps them."""
        return self.share(architecture)(range(architecture.depth), architecture.sizes) <= 1

    def explain(self, architecture: Architecture) -> str:
        """Say what an architecture takes beside what is allowed."""
        parts = []
        if self.memory_limit is not None:
            weights, cache = Memory.of(architecture, self.storage, self.context_length)
            parts.append(
                f"{format_bytes(weights + cache)} ({format_bytes(weights)} of weights in {self.storage}, "
                f"{format_bytes(cache)} of cache for {self.context_length:,} tokens) of memory_limit="
                f"{format_bytes(self.memory_limit)}"
            )
        if self.flops_limit is not None:
            flops = FlopCount.of(architecture)
            parts.append(f"{format_count(flops)} FLOPs a token of flops_limit={format_count(self.flops_limit)}")
        return " and ".join(parts)

    def check_context(self, architecture: Architecture) -> None:
        """Check that a model reads so many tokens.

        Raises:
            ValueError: the context is longer.
        """
        longest = getattr(architecture.config, "max_position_embeddings", None)
        if longest is not None and self.context_length > longest:
            raise ValueError(
                f"context_length={self.context_length:,} is more than the {longest:,} tokens that the models of this "
                f"chain read (max_position_embeddings). Give at most {longest}."
            )


def read_limits(
    memory_limit: float | str | None,
    context_length: int | None,
    storage: str | None,
    flops_limit: float | None,
    **sizes: Any,
) -> Limits | None:
    """Read the limits among the arguments of `from_chain`.

    Args:
        memory_limit: bytes, or text such as "250MB".
        context_length, storage, flops_limit: as of `from_chain`.
        sizes: the arguments that name what is made, which a limit is to decide.

    Returns:
        None where there is none.

    Raises:
        ValueError: an invalid value, or arguments that do not go together.
    """
    if memory_limit is None:
        for name, value in {"context_length": context_length, "storage": storage}.items():
            if value is not None:
                raise ValueError(
                    f"{name}={value!r} has no meaning without memory_limit, which it is counted for. Give "
                    "memory_limit='250MB', or leave it out."
                )
        if flops_limit is None:
            return None
    for name, value in sizes.items():
        if value is not None:
            limit = "flops_limit" if memory_limit is None else "memory_limit"
            raise ValueError(
                f"{limit} makes the largest model that keeps it, and {name}={value!r} names another. Give one of them."
            )
    if flops_limit is not None and (
        isinstance(flops_limit, bool) or not isinstance(flops_limit, Real) or not flops_limit > 0
    ):
        raise ValueError(f"flops_limit={flops_limit!r} must be a positive number of FLOPs a token, such as 2e8.")
    if memory_limit is None:
        return Limits(flops_limit=flops_limit)
    if storage is not None and storage not in STORAGES:
        raise ValueError(
            f"Unknown storage {storage!r}. Storages: {', '.join(STORAGES)}.{did_you_mean(storage, STORAGES)}"
        )
    if isinstance(context_length, bool) or not isinstance(context_length, int) or context_length < 1:
        raise ValueError(
            f"context_length={context_length!r} must be a number of tokens, such as 4096: memory_limit holds the "
            "key/value cache of a row of so many beside the weights."
        )
    return Limits(parse_bytes(memory_limit), context_length, storage or "bf16", flops_limit)
