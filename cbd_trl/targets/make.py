"""From a target to its model: the two anchors are opened, an operator makes the weights, a stock model holds them."""

from typing import Any

import torch
from transformers import PreTrainedModel

from cbd_trl.architectures import describe
from cbd_trl.chain.cards import chain_label
from cbd_trl.chain.chain import Anchor, Chain
from cbd_trl.chain.model import build_model
from cbd_trl.surgery.weights import LazyWeights, Weights
from cbd_trl.targets.calibrate import choose_plan
from cbd_trl.targets.operators import OPERATORS, Pair, Plan
from cbd_trl.targets.request import ANCHOR, Request, Target, target_dtype
from cbd_trl.utils.blocks import TokenBlocks


def make_model(
    chain: Chain,
    request: Request,
    target: Target,
    tokens: TokenBlocks | None,
    dtype: torch.dtype | str | None,
    pair: Pair | None = None,
) -> PreTrainedModel:
    """Make the model of a target, in eval mode; it has a name only where it is an anchor.

    Args:
        tokens: calibration text, or None.
        pair: the target's anchors where they are loaded already.
    """
    upper = target.anchors[0]
    found_dtype = target_dtype(dtype, upper)
    provenance: dict[str, Any] = {
        # It goes wherever the model goes: no path of this machine.
        "chain": chain_label(chain),
        "revision": chain.revision,
        "anchors": [anchor.name for anchor in target.anchors],
        "operator": target.operator,
        "alpha": target.alpha,
        "shape": target.architecture.shape,
        "num_parameters": target.architecture.num_parameters,
    }
    if target.operator == ANCHOR:
        model = upper.load_model(dtype=found_dtype)
    else:
        pair = pair or load_pair(*target.anchors)
        operator, plan = request.operator, Plan(target.architecture, request.alpha)
        if tokens is not None:
            operator, plan = choose_plan(pair, plan, operator, tokens)
            alpha = OPERATORS[operator].default_alpha(pair, plan.target)
            provenance |= {"operator": operator, "alpha": alpha if plan.alpha is None or alpha is None else plan.alpha}
            provenance["calibration_tokens"] = tokens.input_ids.numel()
        row = OPERATORS[operator]
        weights, architecture = row.make(pair, plan)
        if row.default_alpha(pair, plan.target) is not None or not pair.equal_widths:
            weights = _finite(weights, operator)
        model = build_model(architecture, weights, found_dtype)
        model.generation_config = upper.load_generation_config()
        if plan.swapped is not None:
            provenance["swapped_blocks"] = sorted(plan.swapped)
    if limit := describe(model.config).engine_limit():
        provenance["engine_limit"] = limit
    model.config.cbd_trl = provenance
    return model


def load_pair(upper: Anchor, lower: Anchor) -> Pair:
    """Open two neighboring anchors, and the upper one's statistics where a width differs; no tensor is read yet."""
    upper_architecture, lower_architecture = upper.architecture(), lower.architecture()
    assert lower.block_map is not None and lower.kept_layers is not None
    differs = upper_architecture.sizes != lower_architecture.sizes
    return Pair(
        upper.load_weights(),
        upper_architecture,
        lower.load_weights(),
        lower_architecture,
        upper.load_statistics() if differs else None,
        lower.block_map,
        lower.kept_layers,
        lower.block_costs,
    )


def _finite(weights: Weights, operator: str) -> Weights:
    """Wrap weights so that each is checked when it is made."""

    def tensor(key: str) -> torch.Tensor:
        made = weights[key]
        if not all(bound.isfinite() for bound in made.aminmax()):
            raise ValueError(
                f"operator={operator!r} made a tensor that is not finite ({key}). Check the anchors' weights for NaN "
                "or infinity."
            )
        return made

    return LazyWeights(weights, tensor)
