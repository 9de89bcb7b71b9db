"""Models that have learned an embedding for each position: nothing can stand behind the last one."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

# What such embeddings are called in transformers' models (GPT-2 and its kin, OPT and its kin).
_NAMES = {"wpe", "embed_positions", "position_embedding", "position_embeddings", "positions_embed"}


def learned_positions(model: nn.Module) -> int | None:
    """How many tokens a row may have at most.

    Args:
        model: a causal LM, however it is wrapped.

    Returns:
        None for positions that are computed (rotary, ALiBi): there rows may be of any length.
    """
    inside: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    # A tower for images has positions of its own.
    decoder = inside.get_decoder() if hasattr(inside, "get_decoder") else inside
    tables = [
        module.num_embeddings - int(getattr(module, "offset", 0))
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Embedding) and _NAMES & set(name.split("."))
    ]
    return min(tables, default=None)


def learned_positions_of(config: Any) -> int | None:
    """`learned_positions` of a model that is not there yet.

    Args:
        config: of the model.
    """
    with torch.device("meta"):
        return learned_positions(AutoModelForCausalLM.from_config(config))


def check_positions(longest: int, positions: int | None, row: str, model: str, way_out: str) -> None:
    """Refuse a row that is longer than a model has positions.

    Args:
        longest: tokens of the row.
        positions: from `learned_positions`.
        row: names the row.
        model: names the model.
        way_out: what to do, as a sentence.

    Raises:
        ValueError: it is.
    """
    if positions is not None and longest > positions:
        raise ValueError(
            f"{row} has {longest} tokens, and {model} has learned {positions} positions: what stands behind them "
            f"cannot be read. {way_out}"
        )
