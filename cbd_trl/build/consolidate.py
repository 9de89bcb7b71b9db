"""Consolidation: after a chain is built, train its anchors together for the sizes between them.

Each step draws two neighboring anchors and a size between them, assembles the target that `from_chain` would make of
the two as they are, and distills it from the source. The gradient flows through the assembly into both anchors, so
that an anchor in the middle is trained for its sizes above and below. The source, the first anchor, teaches and never
changes. Sandwich training of slimmable networks (Yu and Huang 2019, arXiv 1903.05134) trains the sizes of one set of
weights likewise; here weights are interpolated between several, each size of which is a stock model.
"""

import copy
import functools
import random
import types
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.architectures import Architecture
from cbd_trl.build.arguments import changed_arguments, check_chain_arguments, then_and_now, training_record
from cbd_trl.build.store import finished_chain, store_anchor
from cbd_trl.build.training import ARGUMENTS, EVALUATED, remove_work_folder, separate_run, work_folder
from cbd_trl.build.width_hybrid import MixedModel, parameters_of, weights_of_teacher
from cbd_trl.cards.origin import hub_datasets
from cbd_trl.chain.cards import DATASETS, VALUES, chain_label
from cbd_trl.chain.chain import Anchor, Chain, write_anchor
from cbd_trl.chain.folders import check_place, copy_files
from cbd_trl.chain.manifest import CONSOLIDATION, MANIFEST
from cbd_trl.chain.model import stock_model
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.shapes.spread import spread_targets
from cbd_trl.surgery.blocks import Block
from cbd_trl.targets.from_chain import load_pair
from cbd_trl.targets.operators import Pair, Plan
from cbd_trl.targets.request import open_pair
from cbd_trl.trainers.bridge_config import BridgeDistillConfig
from cbd_trl.trainers.callbacks import show_progress
from cbd_trl.trainers.checkpointing import last_checkpoint
from cbd_trl.trainers.checks import check_best_metric, will_be_sharded
from cbd_trl.trainers.data import check_before_preparing
from cbd_trl.trainers.distill_config import DistillConfig, check_config
from cbd_trl.trainers.distill_trainer import DistillTrainer
from cbd_trl.trainers.hidden_states import LayerPairs, Projectors
from cbd_trl.trainers.hybrid import Pass
from cbd_trl.trainers.model_setup import TeacherSetup, open_student
from cbd_trl.utils.blocks import calibration_length, token_blocks
from cbd_trl.utils.datasets import sft_dataset, sft_datasets
from cbd_trl.utils.files import check_writable, writing
from cbd_trl.utils.modeling import on_device
from cbd_trl.utils.progress import progress_shown

# Shapes that are trained between two anchors. What the cut computes for one takes memory (about 120 MB of the CPU's
# for SmolLM2-135M), so there are a few, spread over the way.
SHAPES = 8
# Of as many shapes of a size one is drawn: that on the line between the anchors, or one with another depth or width.
_SPREAD = 3
# Share of the steps that train a lower anchor itself. Each is also the end of the line that all targets near it lie
# on; where only targets are trained, weights of the anchor that count little in them drift.
OWN_SHARE = 0.25
# The folder of the checkpoints.
_NAME = "consolidation"
# Arguments that this training has no use for, by the reason.
_UNUSED = {
    "every step trains a target or an anchor, and no hybrid beside it": ("swap_probability",),
    "targets of all depths and widths are trained, whose layers have no counterparts in the source": (
        *("hidden_weight", "hidden_weight_end", "hidden_loss", "hidden_projector"),
    ),
    "the tokenizer is the chain's": ("eos_token", "pad_token", "chat_template_path"),
}


def consolidate_chain(
    chain: str | Path | Chain,
    dataset: Dataset | IterableDataset,
    *,
    output_dir: str | Path,
    args: DistillConfig | None = None,
    eval_dataset: Dataset | None = None,
    calibration_tokens: int = 8192,
    revision: str | None = None,
    token: str | None = None,
) -> Chain:
    """Train the anchors of a chain together for the sizes between them, into a new chain.

    Run again with the same arguments, it goes on where it was interrupted.

    Args:
        chain: a chain, its folder, or its Hub id; it is not changed.
        dataset: training text in any format of SFTTrainer; its first tokens also calibrate.
        output_dir: where the new chain is written.
        args: training arguments. `hidden_weight` and `swap_probability` are 0.
        eval_dataset: each lower anchor is evaluated on it after training, when given; evaluations during the training
            are of the smallest anchor.
        calibration_tokens: tokens of text behind the new statistics.
        revision: of a chain on the Hub: branch, tag or commit.
        token: for a chain on the Hub that is private or gated.

    Returns:
        The new chain: the same source; every other anchor with new weights and statistics, its blocks as they were.

    Raises:
        ValueError: before any long work, for a chain, text, arguments or an output folder that cannot be used.
        TypeError: `args` is not a `DistillConfig`.
    """
    output_dir = Path(output_dir)
    args = _settled(args if args is not None else DistillConfig(output_dir=str(output_dir)))
    if not isinstance(chain, Chain):
        chain = Chain.from_pretrained(chain, revision=revision, token=token)
    dataset = sft_dataset(dataset, "dataset", args)
    eval_dataset = sft_datasets(eval_dataset, "eval_dataset", args)
    shapes = _plan(chain, args.seed)
    record = {
        "chain": {"name": chain_label(chain), "revision": chain.revision, "checksum": chain.checksum},
        "calibration_tokens": calibration_tokens,
        ARGUMENTS: training_record(args),
    }
    done = _finished(output_dir, chain, record)
    tokenizer = chain.tokenizer()
    token_blocks(dataset, tokenizer, 2, args=args)
    check_best_metric(args, eval_dataset, None)
    check_before_preparing(dataset, eval_dataset, args, tokenizer, chain.source.config())
    if len(done) < len(chain.anchors):
        check_writable(output_dir)
        with progress_shown(PartialState().is_local_main_process and not args.disable_tqdm):
            _consolidate(chain, shapes, args, dataset, eval_dataset, tokenizer, output_dir, record, done)
    remove_work_folder(output_dir, _NAME)
    return finished_chain(output_dir)


def _settled(args: Any) -> DistillConfig:
    """Check the arguments and fill in those that are open.

    Raises:
        TypeError: they are of another trainer.
        ValueError: naming one that has no use here.
    """
    if not isinstance(args, DistillConfig) or isinstance(args, BridgeDistillConfig):
        raise TypeError(
            f"args is a {type(args).__name__}, but must be a DistillConfig, which has all defaults. Give "
            "args=DistillConfig(...)."
        )
    check_chain_arguments(args, "a consolidation", "the teacher is the largest anchor of the chain")
    for reason, names in _UNUSED.items():
        for name in names:
            if value := getattr(args, name):
                raise ValueError(f"args has {name}={value!r}, and in a consolidation {reason}. Leave it out.")
    options: Any = args.model_init_kwargs or {}  # a string on the command line, a dict once parsed
    if further := sorted(options.keys() - {"attn_implementation"}):
        raise ValueError(
            f"args has model_init_kwargs with {further}, and in a consolidation the anchors are loaded as the chain "
            "has them: they would be ignored. Leave out all but attn_implementation."
        )
    if will_be_sharded(args):
        raise ValueError(
            "A consolidation mixes the weights of two anchors, which FSDP and DeepSpeed shard each on their own. "
            "Train with DDP or one process."
        )
    args = copy.deepcopy(args)
    args.hidden_weight = args.swap_probability = 0.0
    # A step trains two anchors at most.
    args.ddp_find_unused_parameters = True
    check_config(args)
    return args


def _plan(chain: Chain, seed: int) -> list[list[Architecture]]:
    """Choose the shapes that are trained between each two anchors.

    Raises:
        ValueError: nothing lies between any two.
    """
    shapes = [shapes_between(open_pair(*anchors), seed) for anchors in pairwise(chain.anchors)]
    if not any(shapes):
        names = ", ".join(anchor.name for anchor in chain.anchors)
        raise ValueError(
            f"The chain in {chain.path} has the anchors {names}, and no size lies between two of them that could be "
            "trained. Build a chain with a smaller anchor first."
        )
    return shapes


def shapes_between(pair: Pair, seed: int) -> list[Architecture]:
    """Draw the shapes that are trained between two anchors: one of each of `SHAPES` equal parts of the way in
    parameters, on the line between the two or beside it.

    Args:
        pair: the anchors; no weight is read.
        seed: of the draw.

    Returns:
        largest first; fewer where not every part has a shape.
    """
    upper, lower = pair.upper_architecture, pair.lower_architecture
    part = (upper.num_parameters - lower.num_parameters) / SHAPES
    generator, found = random.Random(seed), dict[str, Architecture]()
    for number in reversed(range(SHAPES)):
        wanted = lower.num_parameters + (number + generator.random()) * part
        try:
            offers = spread_targets(
                upper,
                lower,
                pair.blocks,
                wanted,
                _SPREAD,
                tolerance=part / 2 / wanted,
                kept=pair.kept,
                costs=pair.costs,
            )
        except ValueError:  # no shape there
            continue
        architecture = cut_architecture(upper, generator.choice(offers))
        if architecture.shape not in (upper.shape, lower.shape):
            found[str(architecture.shape)] = architecture
    return [*found.values()]


def _finished(output_dir: Path, chain: Chain, record: Mapping[str, Any]) -> list[str]:
    """Name the anchors that an earlier run has written.

    Raises:
        ValueError: the folder holds something else.
    """
    names = [anchor.name for anchor in chain.anchors]
    if output_dir.resolve() == chain.path.resolve():
        raise ValueError(
            f"output_dir={str(output_dir)!r} is the folder of the chain, which stays as it is. Choose another one for "
            "the consolidated chain."
        )
    if not (output_dir / MANIFEST).exists():
        check_place(output_dir, names)
        return []
    there = Chain.from_pretrained(output_dir).anchors
    changed = [] if there[0].files == chain.source.files else ["chain"]
    recorded: Any = {}
    for anchor in there[1:]:
        recorded = (anchor.training.get(CONSOLIDATION) or [{}])[-1]
        changed += [name for name in record if name != ARGUMENTS and recorded.get(name) != record[name]]
        changed += changed_arguments(recorded.get(ARGUMENTS) or {}, record[ARGUMENTS])
    if changed := list(dict.fromkeys(changed)):
        values = [{**one, **(one.get(ARGUMENTS) or {}).get(VALUES, {})} for one in (recorded, record)]
        raise ValueError(
            f"{output_dir} already holds another chain than this consolidation makes ("
            f"{', '.join(anchor.name for anchor in there)}); changed: {', '.join(changed)}"
            f"{then_and_now(changed, *values)}. Choose another output_dir, or delete that folder."
        )
    return [anchor.name for anchor in there]


def _consolidate(
    chain: Chain,
    shapes: Sequence[Sequence[Architecture]],
    args: DistillConfig,
    dataset: Any,
    eval_dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    record: dict[str, Any],
    done: Sequence[str],
) -> None:
    state = PartialState()
    sizes = sum(map(len, shapes))
    state.print(
        f"Consolidating {len(chain.anchors)} anchors: {sizes} sizes between them, taught by {chain.source.name}"
    )
    work = work_folder(output_dir, _NAME, record)
    models: list[Any] = [anchor.load_model() for anchor in chain.anchors]
    if attention := (args.model_init_kwargs or {}).get("attn_implementation"):  # type: ignore[union-attr]
        for model in models:
            model.set_attn_implementation(attention)
    own = copy.deepcopy(args)
    own.output_dir, own.model_init_kwargs = str(work), None
    trainer = ConsolidationTrainer(
        models,
        [load_pair(*anchors) for anchors in pairwise(chain.anchors)],
        shapes,
        args=own,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )
    show_progress(trainer, _NAME)
    with separate_run(trainer, _NAME, output_dir):
        trainer.train(resume_from_checkpoint=last_checkpoint(work))
        losses = trainer.evaluate_anchors() if eval_dataset is not None else [{} for _ in models]
    record = {**record, "tokens_seen": trainer.tokens_seen, DATASETS: list(hub_datasets(dataset))}
    # A trainer is full of cycles: optimizer and gradients go now, before the statistics need room.
    trained = [_independent(anchor, model) for anchor, model in zip(chain.anchors, models, strict=True)]
    del trainer, models
    clear_device_cache(garbage_collection=True)
    length = calibration_length(chain.source.config())
    blocks = token_blocks(dataset, tokenizer, record["calibration_tokens"], length, args)
    for anchor, model, found in zip(chain.anchors, trained, losses, strict=True):
        if anchor.name in done:
            continue
        if anchor is chain.source:
            _copy_source(output_dir, anchor)
            continue
        runs = [*anchor.training.get(CONSOLIDATION, []), record]
        training = {**anchor.training, CONSOLIDATION: runs}
        metadata = {**_metadata(anchor), "text_start": list(blocks.start), "losses": found, "training": training}
        with on_device(model, args.device):
            store_anchor(output_dir, metadata, model, tokenizer, blocks.input_ids)


def _metadata(anchor: Anchor) -> dict[str, Any]:
    """The record of an anchor, as `write_anchor` takes it."""
    fields = ("name", "parent", "text_start", "tokens_seen", "losses", "training")
    blocks = [Block(tuple(block.layers), block.kept, block.cost) for block in anchor.blocks or []]
    return {**{name: getattr(anchor, name) for name in fields}, "blocks": blocks or None}


def _independent(anchor: Anchor, model: Any) -> PreTrainedModel:
    """A stock model of the trained weights, on the CPU."""
    architecture, state = anchor.architecture(), model.state_dict()
    weights = {name: state[name].detach().cpu() for name in architecture.state_shapes}
    stock: Any = stock_model(architecture.config, weights, getattr(torch, anchor.dtype))
    stock.generation_config = anchor.load_generation_config()
    return stock


def _copy_source(output_dir: Path, anchor: Anchor) -> None:
    state = PartialState()
    if state.is_main_process:
        with writing(output_dir / anchor.name, "The chain that it is copied from is whole, and checkpoints stand."):
            write_anchor(output_dir, _metadata(anchor), functools.partial(copy_files, anchor))
    state.wait_for_everyone()


class _Beside(Projectors):
    """The anchors in the middle, which are trained beside the smallest one.

    Args:
        anchors: causal LMs.
    """

    def __init__(self, anchors: Sequence[nn.Module]) -> None:
        nn.Module.__init__(self)
        self.anchors = nn.ModuleList(anchors)

    @property
    def names(self) -> list[str]:
        """Of everything in their state dict."""
        return [*self.state_dict()]


class ConsolidationTrainer(DistillTrainer):
    """Trains the anchors of a chain below the source: at each step through one of them, or a target between two.

    The student is the smallest anchor. The others are trained beside it, as learned projectors are; what runs at a
    step is run in the place of the student's own forward, so that whatever wraps the student wraps it too.

    Args:
        models: of the anchors, largest first.
        pairs: each two neighboring anchors, with the weights and statistics that the chain has of the upper one.
        shapes: that are trained between them, for each pair.
        kwargs: what else a `DistillTrainer` takes.
    """

    def __init__(
        self,
        models: Sequence[Any],
        pairs: Sequence[Pair],
        shapes: Sequence[Sequence[Architecture]],
        **kwargs: Any,
    ) -> None:
        source, *self._anchors = models
        for model in self._anchors[:-1]:
            open_student(model)
        above = [pair.upper_architecture for pair in pairs]
        self._upper = [
            weights_of_teacher(source, above[0], pairs[0].upper),
            *map(parameters_of, self._anchors, above[1:]),
        ]
        self._neighbors, self._shapes = list(pairs), [list(some) for some in shapes]
        sizes = [model.num_parameters() for model in models]
        self._spans = [upper - lower for upper, lower in pairwise(sizes)]
        self._mixed: dict[tuple[int, int | None], MixedModel] = {}
        self._evaluated = len(pairs) - 1
        super().__init__(self._anchors[-1], source, **kwargs)
        self._lent: Any = None
        self._lend_forward()

    def _lend_forward(self) -> None:
        own = self._student.forward

        @functools.wraps(own)
        def forward(student: Any, *args: Any, **kwargs: Any) -> Any:
            run = own if self._lent is None else self._lent
            return run(*args, **kwargs)

        self._student.forward = types.MethodType(forward, self._student)

    def draw(self, step: int) -> tuple[int, int | None]:
        """Draw what a step trains; it depends on step and seed alone, so that all micro-batches and processes train
        the same, and a resumed run what an uninterrupted one does.

        Sizes are drawn evenly in parameters: the small ones, of which there are many to a factor of two, less often.

        Args:
            step: optimizer steps done so far.

        Returns:
            The number of the pair, from the largest on, and that of the shape; None for the lower anchor itself.
        """
        generator = random.Random(f"{self.args.seed}:{step}")
        number = generator.choices(range(len(self._spans)), self._spans)[0]
        if generator.random() < OWN_SHARE or not self._shapes[number]:
            return number, None
        return number, generator.randrange(len(self._shapes[number]))

    def _student_pass(self, model: nn.Module) -> Pass:
        drawn = self.draw(self.state.global_step) if self.model.training else (self._evaluated, None)
        for other, mixed in self._mixed.items():
            if other != drawn:
                mixed.release()
        number, shape = drawn
        anchor = self._anchors[number]
        if shape is None:
            self._lent = None if anchor is self._student else anchor
            return Pass(anchor, model)
        if drawn not in self._mixed:
            plan = Plan(self._shapes[number][shape])
            self._mixed[drawn] = MixedModel(self._neighbors[number], plan, self._upper[number])
        lent = self._mixed[drawn].mixed_with(anchor)
        self._lent = lent.run
        return Pass(lent.model, model)

    def evaluate_anchors(self) -> list[dict[str, float]]:
        """Evaluate each lower anchor on the evaluation set.

        Returns:
            losses for all anchors, none for the source.
        """
        found: list[dict[str, float]] = [{}]
        for number, anchor in enumerate(self._anchors):
            self._evaluated = number
            anchor.eval()
            metrics = self.evaluate()
            found.append({name: metrics[name] for name in sorted(metrics) if name.endswith(EVALUATED)})
        return found

    def _make_projectors(self, setup: TeacherSetup, pairs: LayerPairs) -> Projectors | None:
        return _Beside(self._anchors[:-1]) if len(self._anchors) > 1 else None

    @property
    def _models(self) -> list[Any]:
        return [*self._anchors, *self._teacher.models]
