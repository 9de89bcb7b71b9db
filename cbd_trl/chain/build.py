"""Building a chain: sort the source once, then cut and distil each anchor from the one above it."""

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint

from cbd_trl.architectures import describe
from cbd_trl.chain.calibration import calibration_length, token_blocks
from cbd_trl.chain.manifest import Anchor, Chain
from cbd_trl.chain.model import build_model, stock_model
from cbd_trl.chain.plan import Step, anchor_name, finished_anchors, plan_chain
from cbd_trl.chain.source import Source
from cbd_trl.chain.store import calibration_batches, store_anchor
from cbd_trl.chain.student import choose_blocks, initial_student, refit_student, width_hybrid
from cbd_trl.surgery.blocks import block_costs
from cbd_trl.surgery.sort import importance, sort_weights
from cbd_trl.surgery.statistics import collect_statistics
from cbd_trl.surgery.weights import weights_of
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.trainers.distill_trainer import DistillTrainer


def build_chain(
    source: str | Path | PreTrainedModel,
    anchors: Sequence[Mapping[str, Any] | float],
    *,
    dataset: Dataset | IterableDataset,
    output_dir: str | Path,
    args: DistillConfig | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    eval_dataset: Dataset | None = None,
    calibration_tokens: int = 8192,
    revision: str | None = None,
    token: str | None = None,
) -> Chain:
    """Distil a chain of anchors, each from its next-larger neighbour (arXiv 2605.07783), nested in shared coordinates.

    Run again with the same arguments, it goes on where it was interrupted: finished anchors are kept, an unfinished
    one resumes from its last checkpoint.

    Args:
        source: the largest anchor: a model, a path or a Hub id.
        anchors: the others, largest first. Each a dict of config fields (`{"num_hidden_layers": 16}`), what is left
            out staying as in the anchor above; or a number: above 1 a parameter count, else a ratio to the anchor
            above (depth first down to half the layers, then width). A dict may hold `args` and `dataset` of its own.
        dataset: training text in any format of SFTTrainer; its first tokens also calibrate.
        output_dir: where the chain is written.
        args: training arguments for every anchor. `hidden_weight` (2.0; 0 where a width differs) and
            `swap_probability` (0.5, or 1 where a width differs) have defaults of their own here.
        processing_class: tokenizer; by default the source's.
        eval_dataset: evaluated once for every anchor after training, when given.
        calibration_tokens: tokens of text behind the statistics.
        revision, token: of a source on the Hub.

    Raises:
        ValueError: before any long work, for a source, anchor or folder that cannot be used.
    """
    output_dir = Path(output_dir)
    args = args if args is not None else DistillConfig(output_dir=str(output_dir))
    origin = Source(source, revision, token)
    architecture = describe(origin.config())
    steps = plan_chain(architecture, anchors, args, dataset)
    tokenizer = processing_class if processing_class is not None else origin.tokenizer()
    source_record = {"source": origin.name, "fingerprint": origin.fingerprint()}
    done = finished_anchors(output_dir, architecture, source_record, steps)
    if not done:
        _check_text(dataset, args, tokenizer)
    for step in steps[max(len(done) - 1, 0) :]:
        _check_text(step.dataset, step.args, tokenizer)
    state = PartialState()

    upper = done.get(0)
    if upper is None:
        state.print(f"[1/{len(steps) + 1}] sorting the source ({architecture.num_parameters / 1e6:.1f}M parameters)")
        model: Any = origin.model(args.model_init_kwargs)
        model.to(args.device)
        blocks = _calibration_blocks(model.config, dataset, args, tokenizer, calibration_tokens)
        upper = _write_source(output_dir, model, source_record, tokenizer, blocks)
        del model
    for number, step in enumerate(steps, start=1):
        if number in done:
            upper = done[number]
            continue
        state.print(
            f"[{number + 1}/{len(steps) + 1}] distilling {step.name} from {upper.name}: {step.architecture.shape}"
        )
        upper = _distil_anchor(output_dir, upper, step, tokenizer, eval_dataset, calibration_tokens)
    return Chain.from_pretrained(output_dir)


def _check_text(dataset: Dataset | IterableDataset, args: DistillConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a dataset that gives no tokens before the first anchor is trained, not after it."""
    token_blocks(dataset, tokenizer, 2, text_field=args.dataset_text_field)


def _calibration_blocks(
    config: Any, dataset: Any, args: DistillConfig, tokenizer: PreTrainedTokenizerBase, calibration_tokens: int
) -> torch.Tensor:
    return token_blocks(dataset, tokenizer, calibration_tokens, calibration_length(config), args.dataset_text_field)


def _write_source(
    output_dir: Path,
    model: PreTrainedModel,
    source_record: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    blocks: torch.Tensor,
) -> Anchor:
    architecture = describe(model.config)
    weights = {key: tensor.cpu() for key, tensor in weights_of(model, architecture).items()}
    statistics = collect_statistics(model, architecture, calibration_batches(blocks), blocks.numel())
    scores = importance(weights, architecture, statistics)
    in_order, statistics = sort_weights(weights, architecture, statistics, scores)
    record = {
        "name": anchor_name(architecture.num_parameters),
        "parent": None,
        "block_map": None,
        "tokens_seen": 0,
        "losses": {},
        "training": source_record,
    }
    sorted_model = build_model(architecture, in_order, model.dtype)
    sorted_model.generation_config = model.generation_config
    return store_anchor(output_dir, record, sorted_model, tokenizer, statistics)


def _work_folder(output_dir: Path, upper: Anchor, step: Step) -> Path:
    """Where an anchor's checkpoints are; those of a run with other settings are removed, not gone on from."""
    work = output_dir / ".work" / step.name
    state = PartialState()
    if state.is_main_process:
        made_from = {"upper": upper.files, "shape": step.architecture.shape}
        settings, file = json.dumps({**made_from, **step.training_record()}), work / "settings.json"
        if file.exists() and file.read_text() != settings:
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        file.write_text(settings)
    state.wait_for_everyone()
    return work


def _distil_anchor(
    output_dir: Path,
    upper: Anchor,
    step: Step,
    tokenizer: PreTrainedTokenizerBase,
    eval_dataset: Dataset | None,
    calibration_tokens: int,
) -> Anchor:
    work = _work_folder(output_dir, upper, step)
    args = copy.deepcopy(step.args)
    args.output_dir = str(work)
    teacher: Any = upper.load_model()
    generation_config = copy.deepcopy(teacher.generation_config)
    tokens = _calibration_blocks(teacher.config, step.dataset, args, tokenizer, calibration_tokens)
    blocks = choose_blocks(work / "blocks.json", teacher.to(args.device), step, tokens)
    student: Any = initial_student(upper, step, blocks)
    architecture, block_map = describe(student.config), [list(block.layers) for block in blocks]
    costs = block_costs(blocks)
    checkpoint = get_last_checkpoint(work)
    if checkpoint is None:
        refit_student(student.to(args.device), teacher, blocks, tokens)
    trainer = DistillTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=step.dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        block_map=block_map,
        block_costs=costs,
        hybrid=width_hybrid(upper, step, student, blocks),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    losses = _last_losses(trainer.state.log_history)
    if eval_dataset is not None:
        losses |= {
            key: value for key, value in trainer.evaluate().items() if key.endswith(("loss", "_kd", "_ce", "_hidden"))
        }
    state = trainer.accelerator.get_state_dict(trainer.model)
    state = {name: state[name].detach().cpu() for name in architecture.state_shapes}
    trained: Any = stock_model(architecture.config, state, student.dtype)
    trained.generation_config = generation_config
    trained.to(args.device)
    statistics = collect_statistics(trained, architecture, calibration_batches(tokens), tokens.numel())
    record = {
        "name": step.name,
        "parent": upper.name,
        "block_map": block_map,
        "kept_layers": [block.kept for block in blocks],
        "block_costs": costs,
        "tokens_seen": int(losses.pop("num_tokens", 0)),
        "losses": losses,
        "training": step.training_record(),
    }
    anchor = store_anchor(output_dir, record, trained.cpu(), tokenizer, statistics)
    if PartialState().is_main_process:
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):
            work.parent.rmdir()
    return anchor


def _last_losses(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The latest value of each logged term."""
    losses: dict[str, float] = {}
    for entry in history:
        losses |= {
            key: value
            for key, value in entry.items()
            if key in ("loss", "kd", "ce", "hidden", "teacher_ce", "num_tokens")
        }
    return losses
