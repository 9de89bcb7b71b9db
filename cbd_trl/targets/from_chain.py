"""Make a model of any size between two anchors, without a teacher or a forward pass."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from cbd_trl.architectures import describe
from cbd_trl.chain.cards import chain_label
from cbd_trl.chain.chain import Anchor, Chain
from cbd_trl.chain.model import build_model
from cbd_trl.surgery.weights import LazyWeights, Weights
from cbd_trl.targets.block_choice import blocks_in_context
from cbd_trl.targets.calibrate import calibration_tokens, choose_plan
from cbd_trl.targets.limits import read_limits
from cbd_trl.targets.operators import OPERATORS, Pair, Plan
from cbd_trl.targets.request import ANCHOR, Request, Target, find_targets, open_pair, target_dtype, within_limits
from cbd_trl.targets.saving import check_replaceable, name_unsaved, save_model
from cbd_trl.targets.shape_search import score_by_statistics, score_on_text
from cbd_trl.utils.blocks import TokenBlocks


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
    shape_search: int | None = None,
    memory_limit: float | str | None = None,
    context_length: int | None = None,
    storage: str | None = None,
    flops_limit: float | None = None,
    save_directory: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> PreTrainedModel:
    """Make a stock transformers model of any size between the largest and the smallest anchor of a chain.

    Args:
        chain: a chain, its folder, or its Hub id.
        num_parameters: size wanted (a tied table counts once); the nearest reachable shape on the line between the
            two neighboring anchors is made.
        config: config fields to fix, for example `{"num_hidden_layers": 20}`; `num_parameters`, or else the line,
            decides the rest. Depths that leave the pattern of layers that llama.cpp has built in (SmolLM3, Gemma 2
            and 3; docs/guides/export.md) are made only when they are requested here.
        operator: the rule that makes the weights: "nested" (upper blocks for depth, least-squares cut mixed with the
            lower anchor for width), or another row of `cbd_trl.targets.operators.OPERATORS` to compare it with.
        alpha: weight of the lower anchor where the operator mixes, 0 to 1; None: from the size.
        calibration_dataset: text in any SFT format on which blocks and alpha are chosen by measured loss, never worse
            there than the better of `expand` and `slice`, then blocks by KL to the anchor above (`blocks_in_context`);
            not that of the anchors, on which the smaller one looks too good. None: no data and no forward pass.
        dtype: of the result; None: that of the anchors.
        tolerance: largest relative distance from `num_parameters`.
        shape_search: number of shapes of the size to compare; the best is made. By KL to the anchor above on
            `calibration_dataset`, where that is given; else without data, by the energy that the chain's statistics
            say is lost (docs/guides/from_chain.md). None: the shape on the line.
        memory_limit: bytes, or "250MB" (10^6), "250MiB": the largest size is made whose weights in `storage` fit
            together with the cache of `context_length` tokens, instead of `num_parameters` or `config`. Where the
            largest anchor fits, it is that. What an engine computes in comes on top.
        context_length: tokens of one row that the cache holds, keys and values in 16 bits.
        storage: how the weights will be kept: "float32", "bf16" (None), bitsandbytes' "int8" or "nf4", or a GGUF type
            of llama.cpp ("q4_k_m"; `cbd_trl.shapes.storage.STORAGES`). The model itself is made in `dtype`.
        flops_limit: of a forward pass for each token, attention to the context aside: as or with `memory_limit`.
        save_directory: where to save model, tokenizer, chat template, generation config and provenance. Without it
            the model is nowhere to be loaded from: trainers find its tokenizer, but an adapter trained on it has no
            base that can be loaded, and trainers that reload a reference model by name (GRPO with beta > 0, DPO)
            refuse it.
        revision: of a chain on the Hub: branch, tag or commit.
        token: for a chain on the Hub that is private or gated.

    Returns:
        The model in eval mode; `model.config.cbd_trl` records what it was made from. At an anchor's own shape it is
        that anchor (see `find_targets`).

    Raises:
        ValueError: a size, shape, operator, alpha or limit that is out of reach; the message names what is not.
    """
    limits = read_limits(
        memory_limit, context_length, storage, flops_limit, num_parameters=num_parameters, config=config
    )
    request = Request(num_parameters, config, operator, alpha, tolerance, shape_search, limits=limits)
    directory = None if save_directory is None else Path(save_directory).expanduser().resolve()
    if directory is not None:
        check_replaceable(directory)
    opened = chain
    if not isinstance(chain, Chain):
        # The files in use are verified below; the other anchors are not read at all.
        chain = Chain.from_pretrained(chain, revision=revision, token=token, verify=False)
    request = within_limits(chain, request)
    targets = find_targets(chain, request)
    with nullcontext() if opened is chain else _verified(chain, targets[0]):
        tokens = None if calibration_dataset is None else calibration_tokens(targets[0], calibration_dataset)
        target = choose_shape(targets, request, tokens)
        model = make_model(chain, request, target, tokens, dtype)
        if directory is None and target.operator != ANCHOR:
            name_unsaved(model, chain)
    if directory is not None:
        save_model(model, chain, directory)
        model.config._name_or_path = model.name_or_path = str(save_directory)
    return model


def choose_shape(
    targets: Sequence[Target], request: Request, tokens: TokenBlocks | None, pair: Pair | None = None
) -> Target:
    """Choose the target of the best score, where a search was requested and there is more than an anchor to choose.

    Args:
        tokens: calibration text, or None.
        pair: the targets' anchors where they are loaded already.
    """
    if request.shape_search is None or targets[0].operator == ANCHOR:
        return targets[0]
    if tokens is None:
        return score_by_statistics(targets, request)[0]
    return score_on_text(targets, request, tokens, pair or load_pair(*targets[0].anchors))[0]


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
    if target.score is not None:
        provenance["shape_search"] = {"shapes": request.shape_search, "score": target.score}
    if request.limits is not None:
        provenance["limits"] = dataclasses.asdict(request.limits)
    if target.architecture.family.experts is not None:
        provenance["active_parameters"] = target.architecture.num_active_parameters
    if target.operator == ANCHOR:
        model = upper.load_model(dtype=found_dtype)
    else:
        pair = pair or load_pair(*target.anchors)
        operator, plan = request.operator, Plan(target.architecture, request.alpha)
        if tokens is not None:
            operator, plan = choose_plan(pair, plan, operator, tokens)
            plan = blocks_in_context(pair, plan, operator, tokens)
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
    pair = open_pair(upper, lower)
    statistics = None if pair.equal_widths else upper.load_statistics()
    return dataclasses.replace(pair, upper=upper.load_weights(), lower=lower.load_weights(), statistics=statistics)


@contextmanager
def _verified(chain: Chain, target: Target) -> Iterator[None]:
    """Compare the files of a target with the checksums in chain.json while it is made."""
    for name, files in target.files.items():
        chain[name].need(*files)
    with ThreadPoolExecutor(1) as pool:
        verification = pool.submit(chain.verify, target.files)
        try:
            yield
        finally:
            # Whatever went wrong above, a damaged file is the reason.
            verification.result()


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
