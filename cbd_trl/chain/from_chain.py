"""A model of any size between two anchors, without a teacher or a forward pass."""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from cbd_trl.architectures import Architecture
from cbd_trl.chain.calibrate import choose_plan
from cbd_trl.chain.calibration import calibration_length, token_blocks
from cbd_trl.chain.manifest import Anchor, Chain
from cbd_trl.chain.model import build_model
from cbd_trl.chain.operators import MIXING_OPERATORS, OPERATORS, Pair, Plan, default_alpha
from cbd_trl.chain.shapes import target_architecture
from cbd_trl.chain.solve_shape import solve_target
from cbd_trl.surgery.lazy import LazyWeights
from cbd_trl.surgery.stored_statistics import StoredStatistics
from cbd_trl.surgery.weights import Weights

CALIBRATION_TOKENS = 4096


def from_chain(
    chain: str | Path | Chain,
    num_parameters: float | None = None,
    *,
    config: Mapping[str, int] | None = None,
    operator: str = "nested",
    alpha: float | None = None,
    calibration_dataset: Dataset | None = None,
    dtype: torch.dtype | str | None = None,
    tolerance: float = 0.03,
    save_directory: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> PreTrainedModel:
    """Make a stock transformers model of any size between the largest and the smallest anchor of a chain.

    Args:
        chain: a chain, its folder, or its Hub id.
        num_parameters: size wanted (a tied table counts once); the nearest reachable shape on the line between the
            two neighbouring anchors is made.
        config: config fields to fix, for example `{"num_hidden_layers": 20}`; `num_parameters`, or else the line,
            decides the rest.
        operator: "nested" (upper blocks for depth, least-squares cut mixed with the lower anchor for width), "patch"
            (blocks only), "slice" (upper anchor alone), "expand" (lower anchor alone, grown exactly) or "linear"
            (arXiv 2605.07783).
        alpha: weight of the lower anchor where the operator mixes, 0 to 1; None: from the size.
        calibration_dataset: text in any SFT format on which blocks and alpha are chosen by measured loss, never worse
            there than the better of `expand` and `slice`. None: no data and no forward pass.
        dtype: of the result; None: that of the anchors.
        tolerance: largest relative distance from `num_parameters`.
        save_directory: where to save model, tokenizer, chat template, generation config and provenance. Without it
            `name_or_path` is the anchor that the tokenizer loads from; trainers that reload a reference model by name
            (GRPO with beta > 0, DPO) need the directory.
        revision, token: of a chain on the Hub.

    Returns:
        The model in eval mode; `model.config.cbd_trl` says what it was made from. Where `nested` without alpha comes
        to an anchor's own shape, it is that anchor.

    Raises:
        ValueError: a size, shape, operator or alpha that cannot be had; the message says what can.
    """
    _check_arguments(num_parameters, config, operator, alpha)
    directory = None if save_directory is None else Path(save_directory).expanduser().resolve()
    if directory is not None:
        _check_replaceable(directory)
    opened_here = not isinstance(chain, Chain)
    if not isinstance(chain, Chain):
        # What is used is verified below; the other anchors are not read at all.
        chain = Chain.from_pretrained(chain, revision=revision, token=token, verify=False)
    own_rule = operator == "nested" and alpha is None
    anchor = _own_shape(chain, num_parameters, config) if own_rule else None
    if anchor is None:
        upper, lower = chain.pair_for(num_parameters, config, tolerance)
        fields = solve_target(
            upper.architecture(),
            lower.architecture(),
            lower.block_map or [],
            num_parameters,
            config,
            tolerance,
            operator,
        )
        # Asked for with other words (a rounded size, some of its fields), an anchor's shape still means that anchor.
        anchor = next((end for end in (upper, lower) if end.shape == fields), None) if own_rule else None
    used = [upper, lower] if anchor is None else [anchor]
    with _verified(chain, used if opened_here else []):
        if anchor is not None:
            model = anchor.load_model(dtype=_dtype(dtype, anchor))
            provenance = _provenance(chain, [anchor], "anchor", None, anchor.architecture())
        else:
            model, provenance = _interpolate(chain, upper, lower, fields, operator, alpha, calibration_dataset, dtype)
    model.config.cbd_trl = provenance
    if directory is not None:
        _save(model, chain, directory)
    else:
        model.config._name_or_path = model.name_or_path = str(used[0].path)
    return model


@contextmanager
def _verified(chain: Chain, anchors: list[Anchor]) -> Iterator[None]:
    """Compare these anchors' files with their recorded sha256 while the model is made from them."""
    with ThreadPoolExecutor(1) as pool:
        verification = pool.submit(chain.verify, anchors)
        try:
            yield
        finally:
            # Whatever went wrong above, a damaged file is the reason.
            verification.result()


def _check_arguments(
    num_parameters: float | None, config: Mapping[str, int] | None, operator: str, alpha: float | None
) -> None:
    if operator not in OPERATORS:
        raise ValueError(f"Unknown operator {operator!r}. Operators: {', '.join(OPERATORS)}.")
    if alpha is not None and operator not in MIXING_OPERATORS:
        raise ValueError(
            f"alpha={alpha} has no meaning for operator={operator!r}, which mixes nothing. Leave it out, or use "
            f"{' or '.join(repr(name) for name in MIXING_OPERATORS)}."
        )
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must lie between 0 (the upper anchor's side) and 1 (the lower anchor's).")
    if num_parameters is None and not config:
        raise ValueError(
            "Nothing was asked for. Give num_parameters=138e6, or config={'num_hidden_layers': 20}, or both; "
            "`Chain.sizes()` lists what a chain can make."
        )
    is_number = isinstance(num_parameters, Real) and not isinstance(num_parameters, bool)
    if num_parameters is not None and not (is_number and 0 < num_parameters < math.inf):
        raise ValueError(
            f"num_parameters={num_parameters!r} must be a positive number of parameters, for example 138e6 or "
            "138_000_000."
        )
    for field, value in (config or {}).items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"config: {field} must be a positive integer, got {value!r}. `Chain.sizes()` lists values."
            )


def _own_shape(chain: Chain, num_parameters: float | None, config: Mapping[str, int] | None) -> Anchor | None:
    """The anchor whose shape was asked for exactly, if any."""
    for anchor in chain.anchors:
        fields_match = all(anchor.shape.get(field) == value for field, value in (config or {}).items())
        if num_parameters is not None:
            if fields_match and anchor.num_parameters == int(num_parameters):
                return anchor
        elif fields_match and set(config or {}) == set(anchor.shape):
            return anchor
    return None


def _interpolate(
    chain: Chain,
    upper: Anchor,
    lower: Anchor,
    fields: Mapping[str, int],
    operator: str,
    alpha: float | None,
    calibration_dataset: Dataset | None,
    dtype: torch.dtype | str | None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    upper_architecture = upper.architecture()
    plan = Plan(target_architecture(upper_architecture, fields), alpha)
    pair = load_pair(upper, lower)
    if calibration_dataset is not None:
        length = calibration_length(upper_architecture.config)
        tokens = token_blocks(calibration_dataset, chain.tokenizer(), CALIBRATION_TOKENS, length)
        operator, plan = choose_plan(pair, plan, operator, tokens)
    weights, architecture = OPERATORS[operator](pair, plan)
    if operator == "linear" or not pair.equal_widths:
        weights = _finite(weights, operator)
    mixed = default_alpha(operator, pair, plan.target)
    mixed = plan.alpha if mixed is not None and plan.alpha is not None else mixed
    model = build_model(architecture, weights, _dtype(dtype, upper))
    model.generation_config = upper.load_generation_config()
    provenance = _provenance(chain, [upper, lower], operator, mixed, architecture)
    if plan.swapped is not None:
        provenance["swapped_blocks"] = sorted(plan.swapped)
    return model, provenance


def load_pair(upper: Anchor, lower: Anchor) -> Pair:
    """Two neighbouring anchors, and the upper one's statistics where a width differs; nothing is read yet."""
    upper_architecture, lower_architecture = upper.architecture(), lower.architecture()
    assert lower.block_map is not None
    differs = upper_architecture.sizes != lower_architecture.sizes
    return Pair(
        upper.load_state_dict(),
        upper_architecture,
        lower.load_state_dict(),
        lower_architecture,
        StoredStatistics(upper.statistics_file) if differs else None,
        lower.block_map,
    )


def _finite(weights: Weights, operator: str) -> Weights:
    """The same weights, each checked when it is made."""

    def tensor(key: str) -> torch.Tensor:
        made = weights[key]
        if not all(bound.isfinite() for bound in made.aminmax()):
            raise ValueError(
                f"operator={operator!r} made a tensor that is not finite ({key}). Check the anchors' weights for NaN "
                "or infinity."
            )
        return made

    return LazyWeights(weights, tensor)


def _dtype(dtype: torch.dtype | str | None, anchor: Anchor) -> torch.dtype:
    wanted = anchor.dtype if dtype is None or dtype == "auto" else dtype
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype={dtype!r} is no floating-point type. Use for example torch.bfloat16, 'float32' or None."
        )
    return found


def _provenance(
    chain: Chain, anchors: list[Anchor], operator: str, alpha: float | None, architecture: Architecture
) -> dict[str, Any]:
    return {
        "chain": chain.name_or_path,
        "anchors": [anchor.name for anchor in anchors],
        "operator": operator,
        "alpha": alpha,
        "shape": architecture.shape,
        "num_parameters": architecture.num_parameters,
    }


def _check_replaceable(directory: Path) -> None:
    """Refuse anything but an empty folder or a model that from_chain saved: what is there is replaced as a whole."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    config = directory / "config.json"
    if (
        not config.is_file()
        or "cbd_trl" not in json.loads(config.read_text(encoding="utf-8"))
        or any(entry.is_dir() for entry in directory.iterdir())
    ):
        raise ValueError(
            f"save_directory={str(directory)!r} holds something other than a model that from_chain saved. Choose an "
            "empty or new folder."
        )


def _save(model: PreTrainedModel, chain: Chain, directory: Path) -> None:
    """Write model, tokenizer and provenance under a temporary name, then rename."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary, before = (directory.parent / f".{kind}-{directory.name}-{os.getpid()}" for kind in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.config._name_or_path = model.name_or_path = str(directory)
        model.save_pretrained(temporary)
        chain.tokenizer().save_pretrained(temporary)
        if directory.exists():
            directory.rename(before)
        try:
            temporary.rename(directory)
        except OSError:
            if before.exists():
                before.rename(directory)
            raise
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
