"""Building a chain: sort the source once, then cut and distil each anchor from the one above it."""

import copy
import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint

from ..architectures import Architecture, describe
from ..surgery.blocks import blocks_of, select_layers, spaced_layers
from ..surgery.cut import least_squares_cut
from ..surgery.sort import importance, sort_weights
from ..surgery.statistics import Statistics, collect_statistics
from ..surgery.weights import Weights, weights_of
from ..trainers.distill_config import DistillConfig
from ..trainers.distill_trainer import DistillTrainer
from .calibration import token_blocks
from .manifest import STATISTICS_FILE, Anchor, Chain, write_anchor
from .model import build_model
from .shapes import target_architecture
from .solve_shape import solve_anchor

HIDDEN_WEIGHT = 2.0
SWAP_PROBABILITY = 0.5
_CALIBRATION_BATCH = 4
_RUN_OPTIONS = ("args", "dataset")


@dataclasses.dataclass(frozen=True)
class _Step:
    """One lower anchor to be made."""

    name: str
    architecture: Architecture
    kept: list[int]
    args: DistillConfig
    dataset: Dataset | IterableDataset


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

    Run again with the same arguments, it goes on where it was interrupted: finished anchors are kept, an unfinished one resumes from
    its last checkpoint.

    Args:
        source: the largest anchor: a model, a path or a Hub id.
        anchors: the others, largest first. Each a dict of config fields (`{"num_hidden_layers": 16}`), what is left out staying as in the
            anchor above; or a number: above 1 a parameter count, else a ratio to the anchor above (depth first down to half the
            layers, then width). A dict may hold `args` and `dataset` of its own.
        dataset: training text in any format of SFTTrainer; its first tokens also calibrate.
        output_dir: where the chain is written.
        args: training arguments for every anchor. `hidden_weight` (2.0) and `swap_probability` (0.5 where only depth differs) have
            defaults of their own here.
        processing_class: tokenizer; by default the source's.
        eval_dataset: evaluated once for every anchor after training, when given.
        calibration_tokens: tokens of text behind the statistics.
        revision, token: of a source on the Hub.

    Raises:
        ValueError: before any long work, for a source, anchor or folder that cannot be used.
    """
    output_dir = Path(output_dir)
    args = args if args is not None else DistillConfig(output_dir=str(output_dir))
    config = (
        source.config
        if isinstance(source, PreTrainedModel)
        else AutoConfig.from_pretrained(source, revision=revision, token=token)
    )
    steps = _plan(describe(config), anchors, args, dataset)
    tokenizer = _tokenizer_of(source, processing_class, revision, token)
    done = _finished(output_dir, config, steps)
    state = PartialState()

    upper = done.get(0)
    if upper is None:
        state.print(
            f"[1/{len(steps) + 1}] sorting the source ({describe(config).num_parameters / 1e6:.1f}M parameters)"
        )
        model = _load_source(source, args, revision, token)
        blocks = token_blocks(dataset, tokenizer, calibration_tokens, text_field=args.dataset_text_field)
        upper = _write_source(output_dir, model, tokenizer, blocks)
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


def anchor_name(num_parameters: int) -> str:
    """`134515008` -> `"135M"`."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if num_parameters >= scale:
            value = num_parameters / scale
            return f"{value:.1f}{unit}" if value < 10 else f"{value:.0f}{unit}"
    return str(num_parameters)


def _plan(source: Architecture, anchors: Sequence[Any], args: DistillConfig, dataset: Any) -> list[_Step]:
    """Every anchor's shape and arguments, checked, before anything is loaded."""
    if not anchors:
        raise ValueError(
            "No anchors were asked for. Give at least one, for example anchors=[{'num_hidden_layers': 16}] or anchors=[0.6]."
        )
    steps: list[_Step] = []
    upper, names = source, {anchor_name(source.num_parameters)}
    for position, anchor in enumerate(anchors):
        options = dict(anchor) if isinstance(anchor, Mapping) else {}
        own = {key: options.pop(key) for key in _RUN_OPTIONS if key in options}
        fields = options if isinstance(anchor, Mapping) else solve_anchor(upper, _number(anchor, position))
        target = target_architecture(upper, fields)
        if target.num_parameters >= upper.num_parameters:
            raise ValueError(
                f"anchors[{position}] has {target.num_parameters:,} parameters, no fewer than the anchor above it "
                f"({upper.num_parameters:,}). List anchors from large to small."
            )
        name = stem = anchor_name(target.num_parameters)
        for suffix in range(2, len(names) + 3):
            if name not in names:
                break
            name = f"{stem}-{suffix}"
        names.add(name)
        kept = spaced_layers(upper.depth, target.depth)
        step_args = _step_args(
            own.get("args", args), equal_widths=target.sizes == upper.sizes, depth_cut=target.depth < upper.depth
        )
        steps.append(_Step(name, target, kept, step_args, own.get("dataset", dataset)))
        upper = target
    return steps


def _number(anchor: Any, position: int) -> float:
    if isinstance(anchor, bool) or not isinstance(anchor, int | float) or not math.isfinite(anchor) or anchor <= 0:
        raise ValueError(
            f"anchors[{position}] is {anchor!r}. Give a dict of config fields, a parameter count above 1, or a ratio to the anchor above."
        )
    return float(anchor)


def _step_args(args: DistillConfig, equal_widths: bool, depth_cut: bool) -> DistillConfig:
    args = copy.deepcopy(args)
    if args.hidden_weight is None:
        args.hidden_weight = HIDDEN_WEIGHT
    if args.swap_probability is None:
        args.swap_probability = SWAP_PROBABILITY if equal_widths and depth_cut else 0.0
    return args


def _tokenizer_of(
    source: str | Path | PreTrainedModel, processing_class: PreTrainedTokenizerBase | None, revision: str | None, token: str | None
) -> PreTrainedTokenizerBase:  # fmt: skip
    if processing_class is not None:
        return processing_class
    place = source.name_or_path if isinstance(source, PreTrainedModel) else str(source)
    try:
        return AutoTokenizer.from_pretrained(place, revision=revision, token=token)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer could be loaded from the source ({place!r}: {error}). Pass `processing_class`."
        ) from error


def _load_source(
    source: str | Path | PreTrainedModel, args: DistillConfig, revision: str | None, token: str | None
) -> PreTrainedModel:
    if isinstance(source, PreTrainedModel):
        return source
    options = {"dtype": torch.float32, **(args.model_init_kwargs or {})}
    return AutoModelForCausalLM.from_pretrained(
        source, revision=revision, token=token, use_safetensors=True, **options
    )


def _finished(output_dir: Path, config: Any, steps: Sequence[_Step]) -> dict[int, Anchor]:
    """Anchors that an earlier run finished, by position, checked against what is asked for now."""
    if not (output_dir / "chain.json").exists():
        return {}
    chain = Chain.from_pretrained(output_dir)
    wanted = [(describe(config).shape, None), *[(step.architecture.shape, _fingerprint(step.args)) for step in steps]]
    for position, anchor in enumerate(chain.anchors):
        shape, fingerprint = wanted[position] if position < len(wanted) else (None, None)
        if (
            shape is None
            or anchor.shape != shape
            or (fingerprint is not None and anchor.training.get("fingerprint") != fingerprint)
        ):
            raise ValueError(
                f"{output_dir} already holds a chain whose anchor {anchor.name} ({anchor.shape}) was built with other settings than "
                f"asked for now ({shape}). Choose another output_dir, or delete that folder to build anew."
            )
    return dict(enumerate(chain.anchors))


_FINGERPRINT_FIELDS = (
    "kd_weight", "divergence", "beta", "temperature", "ce_weight", "hidden_weight", "swap_probability", "learning_rate", "max_steps",
    "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "packing", "seed",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "bf16", "fp16",
)  # fmt: skip


def _training_record(args: DistillConfig) -> dict[str, Any]:
    return {
        name: str(value) if not isinstance(value := getattr(args, name), int | float | bool | None) else value
        for name in _FINGERPRINT_FIELDS
    }


def _fingerprint(args: DistillConfig) -> str:
    return hashlib.sha256(json.dumps(_training_record(args), sort_keys=True).encode()).hexdigest()[:16]


def _calibration_batches(blocks: torch.Tensor) -> Any:
    batches = [{"input_ids": batch} for batch in blocks.split(_CALIBRATION_BATCH)]
    return tqdm(batches, desc="Collecting statistics", disable=not PartialState().is_local_main_process, leave=False)


def _write_source(
    output_dir: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, blocks: torch.Tensor
) -> Anchor:
    architecture = describe(model.config)
    weights = {key: tensor.cpu() for key, tensor in weights_of(model, architecture).items()}
    statistics = collect_statistics(model, architecture, _calibration_batches(blocks), blocks.numel())
    weights, statistics = sort_weights(
        weights, architecture, statistics, importance(weights, architecture, statistics)
    )
    record = {
        "name": anchor_name(architecture.num_parameters),
        "parent": None,
        "block_map": None,
        "tokens_seen": 0,
        "losses": {},
        "training": {"source": model.name_or_path},
    }
    sorted_model = build_model(architecture, weights, model.dtype)
    sorted_model.generation_config = model.generation_config
    return _write(output_dir, record, sorted_model, tokenizer, statistics)


def _initial_student(upper: Anchor, step: _Step) -> PreTrainedModel:
    """The least-squares cut of the upper anchor over the kept layers."""
    architecture = upper.architecture()
    weights: Weights = upper.load_state_dict()
    cut, cut_architecture = select_layers(weights, architecture, step.kept)
    if step.architecture.sizes != architecture.sizes:
        statistics = Statistics.load(upper.statistics_file).with_layers(architecture, step.kept)
        cut = least_squares_cut(cut, cut_architecture, statistics, step.architecture)
    dtype = next(iter(weights.values())).dtype
    return build_model(step.architecture, cut, dtype, name_or_path=str(upper.path))


def _distil_anchor(
    output_dir: Path, upper: Anchor, step: _Step, tokenizer: PreTrainedTokenizerBase, eval_dataset: Dataset | None, calibration_tokens: int
) -> Anchor:  # fmt: skip
    work = output_dir / ".work" / step.name
    args = copy.deepcopy(step.args)
    args.output_dir = str(work)
    student = _initial_student(upper, step)
    teacher = upper.load_model()
    generation_config = copy.deepcopy(teacher.generation_config)
    trainer = DistillTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=step.dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        block_map=blocks_of(step.kept),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(work) if work.is_dir() else None)
    losses = _last_losses(trainer.state.log_history)
    if eval_dataset is not None:
        losses |= {
            key: value for key, value in trainer.evaluate().items() if key.endswith(("loss", "_kd", "_ce", "_hidden"))
        }
    weights = trainer.accelerator.get_state_dict(trainer.model)
    weights = {key: tensor.detach().cpu() for key, tensor in weights.items() if key in step.architecture.tensors}
    trained = build_model(step.architecture, weights, student.dtype)
    trained.generation_config = generation_config
    trained.to(args.device)
    blocks = token_blocks(step.dataset, tokenizer, calibration_tokens, text_field=args.dataset_text_field)
    statistics = collect_statistics(trained, step.architecture, _calibration_batches(blocks), blocks.numel())
    record = {
        "name": step.name,
        "parent": upper.name,
        "block_map": blocks_of(step.kept),
        "tokens_seen": int(losses.pop("num_tokens", 0)),
        "losses": losses,
        "training": {**_training_record(step.args), "fingerprint": _fingerprint(step.args)},
    }
    anchor = _write(output_dir, record, trained.cpu(), tokenizer, statistics)
    if PartialState().is_main_process:
        shutil.rmtree(work, ignore_errors=True)
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


def _write(
    output_dir: Path, record: dict[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, statistics: Statistics
) -> Anchor:  # fmt: skip
    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        statistics.save(folder / STATISTICS_FILE)

    state = PartialState()
    if state.is_main_process:
        write_anchor(output_dir, record, fill)
    state.wait_for_everyone()
    return next(
        anchor for anchor in Chain.from_pretrained(output_dir, verify=False).anchors if anchor.name == record["name"]
    )
