"""Build a chain: sort the source once, then cut and distill each anchor from the one above it."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from cbd_trl.architectures.registry import describe_shape
from cbd_trl.build.arguments import training_record
from cbd_trl.build.bridge_step import BridgeStep, plan_bridged_anchor
from cbd_trl.build.plan import AnchorRequest, Given, ShapeSearch, Step, check_anchors, plan_chain, plan_search
from cbd_trl.build.public_anchor import PLACEMENT, Placement, adopt
from cbd_trl.build.resume import chosen_shapes, finished_anchors, pinned_commits
from cbd_trl.build.shape_search import (
    SearchText,
    best_shape,
    blocks_file,
    chosen_step,
    score_shapes,
    score_table,
    search_folder,
    searched_steps,
)
from cbd_trl.build.source_anchor import MADE_WITH, SourceAnchor, plan_source_anchor, store_source_anchor
from cbd_trl.build.special_tokens import SpecialTokens
from cbd_trl.build.store import finished_chain, store_anchor
from cbd_trl.build.student import choose_blocks, initial_student, refit_student, width_hybrid
from cbd_trl.build.training import ARGUMENTS, Trained, remove_work_folder, train, work_folder
from cbd_trl.cards.origin import hub_datasets
from cbd_trl.chain.cards import DATASETS, ORIGINS
from cbd_trl.chain.chain import Anchor, Chain
from cbd_trl.chain.manifest import ALPHA_POWER, PUBLIC_MODEL, SHAPE_SEARCH
from cbd_trl.chain.source import Source
from cbd_trl.surgery.blocks import Block, block_costs
from cbd_trl.trainers.checkpointing import last_checkpoint
from cbd_trl.trainers.checks import check_best_metric, warn_of_rounding
from cbd_trl.trainers.data import check_before_preparing
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.trainers.distill_trainer import DistillTrainer
from cbd_trl.utils.blocks import TokenBlocks, calibration_length, token_blocks
from cbd_trl.utils.datasets import sft_dataset, sft_datasets
from cbd_trl.utils.files import check_writable
from cbd_trl.utils.modeling import on_device
from cbd_trl.utils.progress import progress_shown


def build_chain(
    source: str | Path | PreTrainedModel,
    anchors: Sequence[AnchorRequest],
    *,
    dataset: Dataset | IterableDataset,
    output_dir: str | Path,
    args: DistillConfig | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    bridge: BridgeStep | None = None,
    eval_dataset: Dataset | None = None,
    calibration_tokens: int = 8192,
    shape_search: int | None = None,
    shape_trainings: int = 0,
    shape_training_steps: int = 50,
    revision: str | None = None,
    token: str | None = None,
) -> Chain:
    """Distill a chain of anchors, each from its next-larger neighbor (arXiv 2605.07783), nested in shared coordinates.

    Run again with the same arguments, it goes on where it was interrupted: finished anchors are kept, and an
    unfinished one resumes from its last checkpoint.

    Args:
        source: the largest anchor: a model, a path or a Hub id. With a `bridge` the teacher of the largest anchor, of
            any architecture.
        anchors: the others, largest first. Each a dict of config fields (`{"num_hidden_layers": 16}`), what is left
            out staying as in the anchor above; or a number: above 1 a parameter count, else a ratio to the anchor
            above (depth first down to half the layers, then width; see `shape_search`), or a dict with such a `size`;
            or a model that exists already (a model, a path, a Hub id, or a dict with `model` and `revision`), which
            becomes the anchor where its weights can be matched with the one above, and else its second teacher. A dict
            may hold `args` and `dataset` of its own.
        dataset: training text in any format of SFTTrainer; its first tokens also calibrate.
        output_dir: where the chain is written.
        args: training arguments for every anchor. `hidden_weight` (2.0; 0 where a width differs) and
            `swap_probability` (0.5, or 1 where a width differs) have defaults of their own here. `eos_token`,
            `pad_token` and `chat_template_path`, also of a single anchor, hold for the whole chain, its first anchor
            included, so that every model made from it stops where the anchors were trained to.
        processing_class: the source's tokenizer; by default the one it was saved with. The chain's, too, without a
            `bridge`.
        bridge: for a source with another tokenizer or architecture: the model that it teaches first, across
            vocabularies. That model becomes the largest anchor, and its tokenizer the chain's.
        eval_dataset: evaluated once for every anchor after training, when given.
        calibration_tokens: tokens of text behind the statistics.
        shape_search: how many shapes are compared for each anchor that is requested by its size. Of every shape the
            untrained cut is made, and the one is distilled that is nearest to the anchor above on training text (KL).
        shape_trainings: how many of the best shapes are trained shortly, and compared again.
        shape_training_steps: of each of these trainings.
        revision: of a source on the Hub: branch, tag or commit.
        token: for models on the Hub that are private or gated.

    Raises:
        ValueError: before any long work, for a source, anchor or output folder that cannot be used.
    """
    check_anchors(anchors)
    output_dir = Path(output_dir)
    search = plan_search(anchors, shape_search, shape_trainings, shape_training_steps, chosen_shapes(output_dir))
    args = args if args is not None else DistillConfig(output_dir=str(output_dir))
    dataset = sft_dataset(dataset, "dataset", args)
    eval_dataset = sft_datasets(eval_dataset, "eval_dataset", args)
    origin = Source(source, revision, token)
    start: Any = getattr(bridge, "model", source)  # what bridge must be is checked below
    attention = _attention_of(start)
    special = _special_tokens(args, anchors, bridge)
    if bridge is None:
        source_anchor = plan_source_anchor(origin, processing_class, args, dataset, special)
    else:
        source_anchor = plan_bridged_anchor(
            bridge, origin, processing_class, args, dataset, eval_dataset, output_dir, special
        )
    source_anchor = _with_calibration(source_anchor, calibration_tokens)
    given = Given(source_anchor.tokenizer, token, list(source_anchor.sources), pinned_commits(output_dir))
    architecture = source_anchor.architecture
    steps = plan_chain(architecture, anchors, args, dataset, given, search)
    # All anchors have its dtype. What is loaded as it was saved ("auto") the trainer warns of.
    loaded: Any = source_anchor.args.model_init_kwargs or {}
    warn_of_rounding([getattr(start, "dtype", loaded.get("dtype"))])
    with _progress_of(args):
        done = finished_anchors(output_dir, source_anchor, steps)
        _check_inputs(source_anchor, steps, done, eval_dataset)
        if len(done) <= len(steps):
            check_writable(output_dir)
        for number, anchor in done.items():
            # A run may have been killed while removing it.
            if search is not None and number + 1 in done:
                remove_work_folder(output_dir, search_folder(output_dir, anchor.name).name)
            remove_work_folder(output_dir, anchor.name)
        tokenizer, commits = given.tokenizer, given.commits

        def plan(search: ShapeSearch, above: Sequence[Step]) -> list[Step]:
            # That no model is requested twice was checked.
            known = Given(tokenizer, token, [], commits)
            return plan_chain(architecture, anchors, args, dataset, known, search, above)

        run = _Run(output_dir, source_anchor.tokenizer, special, eval_dataset, calibration_tokens, attention)
        upper = done.get(0) or _make_source_anchor(run, source_anchor, len(steps) + 1)
        # The source is on disk now: free the memory of a model that was passed in.
        del source, start, origin, bridge, source_anchor, given
        _make_anchors(run, upper, steps, done, search, plan)
        return finished_chain(output_dir)


def _with_calibration(source_anchor: SourceAnchor, calibration_tokens: int) -> SourceAnchor:
    made_with = {**source_anchor.record[MADE_WITH], "calibration_tokens": calibration_tokens}
    return dataclasses.replace(source_anchor, record={**source_anchor.record, MADE_WITH: made_with})


def _special_tokens(args: DistillConfig, anchors: Sequence[Any], bridge: BridgeStep | None) -> SpecialTokens:
    own = [anchor.get("args") for anchor in anchors if isinstance(anchor, Mapping)]
    # Arguments of a wrong type are rejected where the anchor is planned.
    trainings = [args, *own, getattr(bridge, "args", None)]
    return SpecialTokens.of(vars(training) for training in trainings if isinstance(training, DistillConfig))


def _attention_of(start: Any) -> str | None:
    """How a model in memory attends that the largest anchor is made from; None for one that is loaded."""
    return start.config._attn_implementation if isinstance(start, PreTrainedModel) else None


@dataclasses.dataclass(frozen=True)
class _Run:
    """What all anchors of a build have in common.

    Args:
        output_dir, eval_dataset, calibration_tokens: as `build_chain` takes them.
        tokenizer: of the chain.
        special: the special tokens that its models stop and pad with.
        attention: `attn_implementation` of the trainings whose arguments name none; None for the default.
    """

    output_dir: Path
    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens
    eval_dataset: Dataset | None
    calibration_tokens: int
    attention: str | None


# The steps of a whole chain, from a search that found shapes, and the first of the steps.
_Plan = Callable[[ShapeSearch, Sequence[Step]], list[Step]]


def _make_anchors(
    run: _Run,
    upper: Anchor,
    steps: Sequence[Step],
    done: Mapping[int, Anchor],
    search: ShapeSearch | None,
    plan: _Plan,
) -> None:
    """Distill the lower anchors that an earlier run did not finish."""
    state = PartialState()
    for number in range(1, len(steps) + 1):
        if number in done:
            upper = done[number]
            continue
        if search is not None and steps[number - 1].search is not None:
            with _progress_of(steps[number - 1].args):
                steps = _with_best_shape(run, upper, steps, number, search, plan)
        step = steps[number - 1]
        place = f"{number + 1}/{len(steps) + 1}"
        state.print(f"[{place}] distilling {step.name} from {upper.name}: {step.architecture.shape}")
        if step.public is not None:
            state.print(step.public.summary)
        if limit := step.architecture.engine_limit(chosen=False):
            state.print(limit)
        label = f"{step.name} {place}"
        with _progress_of(step.args):
            made = _distil_anchor(run, upper, step, label)
        if step.search is not None:
            remove_work_folder(run.output_dir, search_folder(run.output_dir, upper.name).name)
        upper = made


def _with_best_shape(
    run: _Run, upper: Anchor, steps: Sequence[Step], number: int, search: ShapeSearch, plan: _Plan
) -> list[Step]:
    """Find the shape of the next anchor, and plan those below it anew."""
    step, above = steps[number - 1], list(steps[: number - 1])
    assert step.search is not None
    state = PartialState()
    plans = searched_steps(
        upper.architecture(), number - 1, step.search["size"], search, lambda found: plan(found, above)
    )
    state.print(f"[{number + 1}/{len(steps) + 1}] comparing {len(plans)} shapes for the anchor below {upper.name}")
    text = SearchText.read(
        upper.config(), step.dataset, _without_template(step.args), run.tokenizer, run.calibration_tokens
    )
    scores = score_shapes(
        search_folder(run.output_dir, upper.name),
        upper,
        [planned[number - 1] for planned in plans],
        search,
        text,
        step.args.device,
        lambda *cut: _short_training(run, upper, search.training_steps, *cut),
    )
    state.print(score_table(scores))
    best = plans[best_shape(scores)]
    best[number - 1] = chosen_step(best[number - 1], scores)
    return best


def _short_training(
    run: _Run, upper: Anchor, max_steps: int, step: Step, student: Any, blocks: list[Block], folder: Path
) -> PreTrainedModel:
    """Train an untrained cut for some steps, without checkpoints and logs."""
    args = _without_template(step.args)
    args.output_dir, args.max_steps, args.report_to = str(folder), max_steps, []
    args.save_strategy, args.eval_strategy, args.load_best_model_at_end = SaveStrategy.NO, IntervalStrategy.NO, False
    teachers = _teachers(upper.load_model(), step)
    run.special.follow(student, run.tokenizer)
    short = dataclasses.replace(run, eval_dataset=None)
    trainer = _trainer(short, upper, step, args, teachers, student, blocks, None)
    return train(trainer, student, None, describe_shape(step.architecture.shape, short=True)).model


def _progress_of(args: DistillConfig) -> AbstractContextManager[None]:
    return progress_shown(PartialState().is_local_main_process and not args.disable_tqdm)


def _without_template(args: DistillConfig) -> DistillConfig:
    """Copy training arguments for the chain's tokenizer, which has the template already."""
    args = copy.deepcopy(args)
    args.chat_template_path = None
    return args


def _check_inputs(
    source_anchor: SourceAnchor, steps: Sequence[Step], done: Mapping[int, Anchor], eval_dataset: Any
) -> None:
    """Check weights and text of everything still to be made, before any of it starts.

    Raises:
        ValueError: weights that are missing or do not fit, or text that cannot be tokenized or trained on.
    """
    if not done:
        for source in source_anchor.sources:
            source.check_weights()
        _check_text(source_anchor.dataset, source_anchor.args, source_anchor.tokenizer)
    for step in steps[max(len(done) - 1, 0) :]:
        if step.public is not None:
            step.public.source.check_weights()
        _check_text(step.dataset, step.args, source_anchor.tokenizer)
        if step.search is not None:
            count, config = source_anchor.record[MADE_WITH]["calibration_tokens"], source_anchor.architecture.config
            SearchText.read(config, step.dataset, _without_template(step.args), source_anchor.tokenizer, count)
        check_best_metric(step.args, eval_dataset, None)
        for reader in (source_anchor.architecture, step.second_teacher):
            if reader is not None:
                check_before_preparing(step.dataset, eval_dataset, step.args, source_anchor.tokenizer, reader.config)


def _check_text(dataset: Dataset | IterableDataset, args: DistillConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a dataset gives tokens, before the first anchor is trained and not after it."""
    token_blocks(dataset, tokenizer, 2, args=args)


def _calibration_blocks(
    config: Any, dataset: Any, args: DistillConfig, tokenizer: PreTrainedTokenizerBase, calibration_tokens: int
) -> TokenBlocks:
    return token_blocks(dataset, tokenizer, calibration_tokens, calibration_length(config), args)


def _make_source_anchor(run: _Run, source_anchor: SourceAnchor, count: int) -> Anchor:
    PartialState().print(f"[1/{count}] {source_anchor.description}")
    made = source_anchor.make(f"{source_anchor.name} 1/{count}")
    # Of a bridge: its trainer is full of cycles.
    clear_device_cache(garbage_collection=True)
    blocks = _calibration_blocks(
        made.model.config, source_anchor.dataset, source_anchor.args, run.tokenizer, run.calibration_tokens
    )
    with on_device(made.model, source_anchor.args.device):
        anchor = store_source_anchor(run.output_dir, source_anchor, made, blocks)
    remove_work_folder(run.output_dir, source_anchor.name)
    return anchor


def _distil_anchor(run: _Run, upper: Anchor, step: Step, label: str) -> Anchor:
    record = training_record(step.args)
    settings = {"upper": upper.files, "shape": step.architecture.shape, ARGUMENTS: record}
    if step.public is not None:
        settings[PUBLIC_MODEL] = step.public.record()
    work = work_folder(run.output_dir, step.name, settings)
    text, blocks, trained = _train_anchor(run, work, upper, step, label)
    training: dict[str, Any] = {ARGUMENTS: record, DATASETS: hub_datasets(step.dataset)}
    if step.public is not None:
        training |= {ORIGINS: [step.public.source.origin().record()], PUBLIC_MODEL: step.public.record()}
        if step.matched is not None:
            placement = Placement.load(work / PLACEMENT)
            training["match"] = placement.quality
            if placement.alpha_power is not None:
                training[ALPHA_POWER] = placement.alpha_power
    if step.search is not None:
        training[SHAPE_SEARCH] = dict(step.search)
    metadata = {
        "name": step.name,
        "parent": upper.name,
        "blocks": blocks,
        "text_start": list(text.start),
        "tokens_seen": trained.tokens_seen,
        "losses": trained.losses,
        "training": training,
    }
    # A trainer is full of cycles: teacher and optimizer go now, before the statistics need room.
    clear_device_cache(garbage_collection=True)
    model: Any = trained.model
    anchor = store_anchor(run.output_dir, metadata, model.to(step.args.device), run.tokenizer, text.input_ids)
    remove_work_folder(run.output_dir, step.name)
    return anchor


def _train_anchor(
    run: _Run, work: Path, upper: Anchor, step: Step, label: str
) -> tuple[TokenBlocks, list[Block], Trained]:
    """Cut the anchor and train it; nothing of the training is left but what is returned.

    Returns:
        the calibration text, the blocks that its layers stand for, and the model.
    """
    args = _without_template(step.args)
    args.output_dir = str(work)
    teacher: Any = upper.load_model()
    text = _calibration_blocks(teacher.config, step.dataset, args, run.tokenizer, run.calibration_tokens)
    tokens = text.input_ids
    checkpoint = last_checkpoint(work)
    student: Any
    if step.matched is not None:
        student, placement = adopt(work / PLACEMENT, upper, teacher.to(args.device), step.matched, tokens)
        blocks, power = list(placement.blocks), placement.alpha_power
    else:
        # A search has chosen its blocks already.
        searched = blocks_file(search_folder(run.output_dir, upper.name), step.architecture.depth)
        file = work / "blocks.json" if step.search is None else searched
        blocks = choose_blocks(file, teacher.to(args.device), step, tokens)
        student, power = initial_student(upper, step, blocks), None
    student.generation_config = copy.deepcopy(teacher.generation_config)
    run.special.follow(student, run.tokenizer)
    if checkpoint is None and step.matched is None:
        refit_student(student.to(args.device), teacher, blocks, tokens)
    trainer = _trainer(run, upper, step, args, _teachers(teacher, step), student, blocks, power)
    return text, blocks, train(trainer, student, checkpoint, label)


def _teachers(above: Any, step: Step) -> list[Any]:
    """The anchor above, and the model that teaches beside it."""
    if step.public is None or step.second_teacher is None:
        return [above]
    return [above, step.public.teacher(above.dtype)]


def _trainer(
    run: _Run,
    upper: Anchor,
    step: Step,
    args: DistillConfig,
    teachers: list[Any],
    student: Any,
    blocks: list[Block],
    power: float | None,
) -> DistillTrainer:
    """Make the trainer of a student and the hybrids beside it."""
    # From here on: a kernel may not take what is run before, outside of the training's autocast.
    if attention := (args.model_init_kwargs or {}).get("attn_implementation", run.attention):  # type: ignore[union-attr]
        for model in (*teachers, student):
            model.set_attn_implementation(attention)
    return DistillTrainer(
        model=student,
        teacher_model=teachers,
        args=args,
        train_dataset=step.dataset,
        eval_dataset=run.eval_dataset,
        processing_class=run.tokenizer,
        block_map=[list(block.layers) for block in blocks],
        block_costs=block_costs(blocks),
        hybrid=width_hybrid(upper, teachers[0], step, student, blocks, power),
    )
