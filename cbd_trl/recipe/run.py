"""Build the chain of a recipe, and measure it."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.build.bridge_step import BridgeStep
from cbd_trl.build.build import build_chain
from cbd_trl.chain.chain import Chain
from cbd_trl.chain.measurements import MEASURED
from cbd_trl.chain.source import Source
from cbd_trl.losses.held_out import held_out_loss
from cbd_trl.recipe.check import Check, check_recipe, remember
from cbd_trl.recipe.configs import anchor_args
from cbd_trl.recipe.data import load_data
from cbd_trl.recipe.schema import Recipe, RecipeError
from cbd_trl.report.measure import add_bits_per_byte
from cbd_trl.report.page import save_measurements
from cbd_trl.report.sweep import RANDOM, REPORTED, SweepTarget, fingerprint, sweep
from cbd_trl.targets.many import describe_targets
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.utils.blocks import TokenBlocks, token_blocks
from cbd_trl.utils.progress import Progress

# Every measurement as soon as it is made.
RESULTS = "evaluation-results.json"


def evaluate_chain(
    chain: Chain,
    folder: Path,
    blocks: TokenBlocks,
    sizes: Sequence[Mapping[str, Any] | float],
    device: Any,
    operators: Sequence[str] = REPORTED[:1],
    seed: int = 0,
) -> dict[str, list[dict[str, Any]]]:
    """Measure each anchor, and targets of each size; what an earlier run measured is kept.

    Args:
        chain: finished.
        folder: of the chain. The report is written there, with a picture, and the chain's card shows both.
        blocks: text that nothing was trained on.
        sizes: parameter counts or config fields of targets. One that cannot be reached is named and left out: which
            layers stand for which is known only when the anchors are made, and with it the depths between two of them.
        device: to measure on.
        operators: each makes every target; "random" for fresh weights.
        seed: of the random weights.

    Returns:
        the content of `loss-against-size.json`: what `sweep` returns, with bits per byte and tokens seen.
    """

    def loss(model: PreTrainedModel) -> float:
        return held_out_loss(model.to(device), blocks)

    targets = [
        SweepTarget(config=size) if isinstance(size, Mapping) else SweepTarget(num_parameters=size) for size in sizes
    ]
    with Progress("measuring") as bar:
        report = sweep(
            chain,
            [target for target in targets if _is_reachable(chain, target)],
            [name for name in operators if name != RANDOM],
            loss,
            results=folder / RESULTS,
            key=fingerprint(blocks.input_ids, blocks.labels),
            seed=seed,
            random=RANDOM in operators,
            on_step=bar.at,
        )
    for entry, anchor in zip(report["anchors"], chain.anchors, strict=True):
        entry["tokens_seen"] = anchor.tokens_seen
    add_bits_per_byte(report, chain.tokenizer(), blocks)
    if report != _read_json(folder / MEASURED):
        save_measurements(chain, report)
    return report


def _is_reachable(chain: Chain, target: SweepTarget) -> bool:
    try:
        sizes = None if target.num_parameters is None else [target.num_parameters]
        describe_targets(chain, sizes, config=target.config or None)
    except ValueError as error:
        size = "" if target.num_parameters is None else f"{target.num_parameters:,.0f}"
        print(f"evaluation.sizes: {size or target} is not measured. {error}")
        return False
    return True


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def build_recipe(recipe: Recipe) -> Chain:
    """Check a recipe whole, build its chain, and measure it.

    Run again, it goes on where it was interrupted; see `build_chain`.

    Args:
        recipe: from `read_recipe`.

    Raises:
        RecipeError: before any work, with everything that is wrong.
    """
    return build_checked(check_recipe(recipe))


def build_checked(check: Check, on_stage: Callable[[str], None] = lambda stage: None) -> Chain:
    """Build the chain of a checked recipe, and measure it.

    Args:
        check: from `check_recipe`.
        on_stage: called with "anchors" before they are made, and with "evaluation" before the chain is measured.

    Raises:
        RecipeError: the check found problems.
    """
    recipe, args = check.recipe, check.args
    if check.problems:
        raise RecipeError(recipe.name, check.problems, recipe.lines)
    assert recipe.source is not None and args is not None
    tokenizer, state = Source(recipe.source.name, recipe.source.revision).tokenizer_or(None), PartialState()
    # Read first: text that cannot be measured on is better known before days of training than after them.
    blocks = _held_out(recipe, args, check.tokenizer) if recipe.evaluation is not None else None
    dataset = load_data(recipe.data, tokenizer, args.seed)
    if state.is_main_process:
        remember(recipe)
    on_stage("anchors")
    chain = build_chain(
        recipe.source.name,
        [_anchor(recipe, number, tokenizer) for number in range(len(recipe.anchors))],
        dataset=dataset,
        output_dir=recipe.output_dir,
        args=args,
        bridge=_bridge(check, tokenizer),
        calibration_tokens=recipe.calibration_tokens,
        shape_search=recipe.shape_search,
        shape_trainings=recipe.shape_trainings,
        shape_training_steps=recipe.shape_training_steps,
        revision=recipe.source.revision,
    )
    if recipe.evaluation is not None and blocks is not None and state.is_main_process:
        on_stage("evaluation")
        wanted, folder = recipe.evaluation, Path(recipe.output_dir)
        evaluate_chain(chain, folder, blocks, wanted.sizes, args.device, wanted.operators, args.seed)
    state.wait_for_everyone()
    return chain


def _anchor(recipe: Recipe, number: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """An anchor as `build_chain` takes it, with arguments and text of its own."""
    anchor = recipe.anchors[number]
    args, target = anchor_args(recipe, anchor.args), anchor.target
    own: dict[str, Any] = {**(target if isinstance(target, Mapping) else {"size": target}), "args": args}
    if anchor.data:
        own["dataset"] = load_data(anchor.data, tokenizer, args.seed, f"anchors[{number}].data")
    return own


def _bridge(check: Check, tokenizer: PreTrainedTokenizerBase) -> BridgeStep | None:
    bridge = check.recipe.bridge
    if bridge is None or check.bridge is None:
        return None
    dataset = load_data(bridge.data, tokenizer, check.bridge.seed, "bridge.data") if bridge.data else None
    return BridgeStep(bridge.model, args=check.bridge, dataset=dataset)


def _held_out(recipe: Recipe, args: DistillConfig, tokenizer: PreTrainedTokenizerBase) -> TokenBlocks:
    """Blocks of the text to measure on, in the tokens of the anchors: with a bridge these are not the source's."""
    assert recipe.evaluation is not None
    wanted = recipe.evaluation
    rows = load_data(wanted.data, tokenizer, args.seed, "evaluation.data")
    try:
        return token_blocks(rows, tokenizer, wanted.tokens, wanted.length, args)
    except ValueError as error:
        raise RecipeError(recipe.name, [f"evaluation.data: {error}"], recipe.lines) from error
