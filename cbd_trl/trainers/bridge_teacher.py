"""A teacher with tokens of its own: loaded, checked and compared with a student of other tokens.

Shapes: B rows, T tokens of the student, R texts, U tokens of the teacher, D its width, N scored tokens, G groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from cbd_trl.architectures import decoder_layers
from cbd_trl.architectures.backbone import Head, output_head, product_dtype
from cbd_trl.bridge.alignment import NOWHERE
from cbd_trl.bridge.bridge import Bridge
from cbd_trl.bridge.objectives.inputs import AlignedStates, Places
from cbd_trl.teachers.local import Batch, LocalTeacher, load_teacher
from cbd_trl.trainers.bridge_config import HIDDEN_WEIGHT, BridgeDistillConfig
from cbd_trl.trainers.bridge_data import BridgePlan
from cbd_trl.trainers.model_card import describe_model
from cbd_trl.trainers.model_setup import TeacherModel, TeacherSetup, open_student
from cbd_trl.trainers.step_loss import StepLoss
from cbd_trl.utils.formatting import readable_name
from cbd_trl.utils.tokenizers import check_rows, find_tokenizer, tokenizer_name, vocabulary_rows

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class BridgeOutputs:
    """The output of a teacher with tokens of its own for a micro-batch.

    Attributes:
        teacher: at the tokens of groups.
        plan: of the batch.
        ids_BT: the student's tokens.
    """

    teacher: AlignedStates
    plan: BridgePlan
    ids_BT: Tensor


class BridgeTeacher(LocalTeacher):
    """A frozen causal LM that reads the texts of a batch in its own tokens, put there by `BridgeCollator`.

    Args:
        model: what `load_teacher` returned.
        embedded: whether the objective reads input embeddings of both models.
    """

    def __init__(self, model: Any, embedded: bool = False) -> None:
        super().__init__(model)
        self._embedded = embedded

    @property
    def models(self) -> list[Any]:
        """None: it does not run on the student's batch."""
        return []

    @torch.no_grad()
    def predict(self, batch: Batch, student: nn.Module) -> BridgeOutputs:  # type: ignore[override]  # no positions shared
        """Compute the teacher's output for the texts of a batch.

        Args:
            batch: with the tensors of `BridgeCollator`.
            student: unused.
        """
        ids_RU, mask_RU, plan = (batch.teacher[f"teacher_{name}"] for name in ("ids", "mask", "plan"))
        inside = _AlignedStatesOf(self.model, ids_RU, plan.teacher, self._embedded)
        teacher = self._placed(input_ids=ids_RU, attention_mask=mask_RU, use_cache=False, inside=inside)
        return BridgeOutputs(teacher, plan, batch.inputs["input_ids"])


@dataclass(frozen=True)
class _AlignedStatesOf:
    model: Any
    ids_RU: Tensor
    places: Places
    embedded: bool

    def __call__(self, hidden_RUD: Tensor) -> AlignedStates:
        with output_head(self.model, keep=True) as head:
            # The parts of a teacher that is spread over devices are where its `device_map` put them.
            device = self.ids_RU.device
            dtype = product_dtype(head, device)
            embedding_VD = self.model.get_input_embeddings().weight.to(device) if self.embedded else None
            return AlignedStates.of(
                hidden_RUD.to(device, dtype), head.to(dtype).to(device), self.ids_RU, self.places, embedding_VD
            )


class AbsentTeacher:
    """The teacher of SeqKD: its outputs are the text of the dataset, and it does not run."""

    @property
    def models(self) -> Sequence[PreTrainedModel]:
        """None."""
        return []

    def place(self, accelerator: Accelerator, offload: bool = False) -> None:
        """There is nothing to place."""

    def predict(self, batch: Batch, student: nn.Module) -> None:
        """There is no output."""


class BridgeStepLoss(StepLoss):
    """`StepLoss` with a `BridgeOutputs` and an objective of `cbd_trl.bridge.objectives.registry`.

    One more term is "unaligned": 1 for a token in no group, which nothing of the teacher is compared with. The
    hidden-state term is taken behind the last tokens of groups, where both models have read the same bytes, and is
    written on the first, like "kd".
    """

    def _terms(self, hidden_BTd: Tensor, head: Head) -> tuple[Tensor, dict[str, Tensor]]:
        predicted, plan = self.teacher, self.teacher.plan
        embedded = predicted.teacher.embedding_VD is not None
        embedding_Vd = self.student.get_input_embeddings().weight.to(self.labels_BT.device) if embedded else None
        student = AlignedStates.of(hidden_BTd, head, predicted.ids_BT, plan.student, embedding_Vd, plan.prefix)
        total, terms = self.objective(student, predicted.teacher, self.weights, self.chunk)
        return total, {**terms, "unaligned": (student.places.group_N == NOWHERE).float()}

    def _hidden(self) -> Tensor | None:
        plan = self.teacher.plan
        ours_G, theirs_G = plan.last["student"], plan.last["teacher"]
        hidden_G = self.pairs.distance(
            self.student_states,
            self.teacher_states,
            lambda states: states.flatten(0, 1).index_select(0, ours_G),
            lambda states: states.flatten(0, 1).index_select(0, theirs_G),
        )
        if hidden_G is None:
            return None
        return hidden_G.new_zeros(len(plan.student)).index_add(0, plan.student.start_G, hidden_G)


# How much worse than guessing a teacher may be, in nats: one that was trained on these tokens never is.
_MARGIN = 1.5
# Of what guessing costs, where a teacher is suspicious: on WikiText-2 SmolLM2-135M is at 0.28 with its own tokens, at
# 0.87 with those of a tokenizer of 8,192, at 0.98 where every id is another one's.
_SUSPICIOUS = 0.75
# Fewer tokens could be so by chance.
_ENOUGH_TOKENS = 64


class TeacherWatch:
    """Checks once that the teacher knows its tokenizer: with a wrong one it hardly does better than guessing.

    Args:
        bridge: names the tokenizers.
        rows: vocabulary rows of the teacher.
    """

    def __init__(self, bridge: Bridge, rows: int) -> None:
        self._names = tokenizer_name(bridge.student.tokenizer), tokenizer_name(bridge.teacher.tokenizer)
        self._rows = rows
        self._nats, self._tokens = 0.0, 0

    @property
    def waiting(self) -> bool:
        """Whether there is not enough yet to tell."""
        return self._tokens < _ENOUGH_TOKENS

    def look(self, nats: Any, tokens: int) -> None:
        """Add a batch, until there is enough to tell.

        Args:
            nats: cross-entropy of the teacher on its own tokens, summed; a number or a scalar tensor.
            tokens: how many they are.

        Raises:
            ValueError: if the teacher does worse than guessing, or its loss is not finite.
        """
        self._nats, self._tokens = self._nats + float(nats), self._tokens + tokens
        if self.waiting:
            return
        mean, guess = self._nats / self._tokens, math.log(self._rows)
        found = (
            f"The teacher's cross-entropy on its own tokens is {mean:.2f} nats, and guessing among its {self._rows} "
            f"tokens costs {guess:.2f}"
        )
        if not math.isfinite(mean):
            raise ValueError(
                f"{found}: its weights are damaged, or its dtype is too narrow. Load it from a good copy, or in "
                "bfloat16 or float32."
            )
        names = f"The student's is {self._names[0]}, the teacher's {self._names[1]}."
        if mean > guess + _MARGIN:
            raise ValueError(
                f"{found}: it was not trained with the tokenizer it was given. {names} Pass the teacher's own as "
                "`teacher_processing_class`."
            )
        if mean > _SUSPICIOUS * guess:
            logger.warning(
                f"{found}: so little is known by a teacher that is hardly trained, on text of a kind it never saw, or "
                f"with a tokenizer that is another model's. {names} If the teacher's own is another, pass that as "
                "`teacher_processing_class`."
            )


@dataclass(frozen=True)
class BridgeSetup(TeacherSetup):
    """A teacher with tokens of its own, and what the trainer has to know of it.

    Attributes:
        bridge: between the two tokenizers.
        watch: checks the teacher on its first tokens.
    """

    bridge: Bridge
    watch: TeacherWatch


# Padding of a vocabulary is a few rows in a hundred at most.
_USED_ROWS = 0.9


def set_up_bridge_teacher(
    named: TeacherModel,
    student: Any,
    args: BridgeDistillConfig,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> BridgeSetup:
    """Load and check the teacher and its tokenizer.

    Args:
        named: the trainer's `teacher_model`, or what `args` names.
        student: not wrapped for training; its forward is opened.
        args: of the run.
        tokenizer: makes the training data.
        teacher_tokenizer: the teacher's own; None to look for it where the teacher was loaded from.

    Raises:
        ValueError: for several teachers, a teacher without a tokenizer, a model that lacks rows for its tokenizer, a
            tokenizer that contradicts the one saved with the teacher, or whose tokens do not tell their bytes.
        TypeError: if the teacher is neither a model nor a string.
    """
    if isinstance(named, list | tuple):
        raise ValueError(
            f"teacher_model is a list of {len(named)}: teachers with tokens of their own have no common distribution "
            "to average. Give one teacher."
        )
    open_student(student)
    init_kwargs: Any = args.teacher_model_init_kwargs  # a string on the command line, a dict once parsed
    model = load_teacher(
        named,  # type: ignore[arg-type]  # what else it may be is refused there
        student,
        init_kwargs=init_kwargs,
        revision=args.teacher_model_revision,
        trust_remote_code=args.trust_remote_code,
    )
    place = named if isinstance(named, str) else getattr(model.config, "_name_or_path", None)
    saved = find_tokenizer(place, args.teacher_model_revision, local_only=not isinstance(named, str))
    if teacher_tokenizer is None:
        teacher_tokenizer = saved
    elif saved is not None:
        _compare_with_saved(teacher_tokenizer, saved, "teacher", readable_name(place), isinstance(named, str))
    if teacher_tokenizer is None:
        raise ValueError(
            f"No tokenizer was found for the teacher {readable_name(place) or 'made in memory'}: its tokens are not "
            "the student's, so its own are needed to let it read. Pass `teacher_processing_class`; if it has the "
            "student's tokenizer, use DistillTrainer."
        )
    _compare_with_students(tokenizer, student)
    check_rows("student", vocabulary_rows(student), tokenizer, "processing_class")
    check_rows("teacher", vocabulary_rows(model), teacher_tokenizer, "teacher_processing_class")
    _warn_of_unused_rows(vocabulary_rows(model), teacher_tokenizer)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    bridge = Bridge(tokenizer, teacher_tokenizer, longest)
    text = f"{describe_model(model, place)}, by a tokenizer of {len(teacher_tokenizer):,} tokens"
    teacher = BridgeTeacher(model, embedded="dskd-cma" in args.objectives)
    watch = TeacherWatch(bridge, vocabulary_rows(model))
    return BridgeSetup(teacher, model, vocabulary_rows(student), text, bridge, watch)


def set_up_black_box(student: Any, teacher_tokenizer: Any) -> TeacherSetup:
    """Set up a run whose teacher is there by the text it wrote alone.

    Args:
        student: not wrapped for training; its forward is opened.
        teacher_tokenizer: the trainer's argument.

    Raises:
        ValueError: a tokenizer was given for the teacher.
    """
    if teacher_tokenizer is not None:
        raise ValueError(
            "teacher_processing_class was given with objective='seqkd', which reads what the teacher wrote as text: "
            "it would not be used. Leave it out."
        )
    open_student(student)
    return TeacherSetup(
        AbsentTeacher(), None, vocabulary_rows(student), "not at hand: the data is text that it wrote (SeqKD)"
    )


def choose_hidden(args: BridgeDistillConfig, student: Any, teacher: Any, optimizer: Any) -> dict[str, Any]:
    """Choose whether there is a hidden-state term where the arguments leave it open.

    Args:
        args: of the run.
        student: not wrapped for training.
        teacher: likewise.
        optimizer: that was passed in, made before there were projectors; None for the Trainer's own.

    Returns:
        values of `hidden_weight` and `hidden_projector`; empty where `hidden_weight` is given.
    """
    if args.hidden_weight is not None:
        return {}
    projector = optimizer is None and _layers_pair_up(student, teacher)
    return {"hidden_projector": projector, "hidden_weight": HIDDEN_WEIGHT if projector else 0.0}


def _layers_pair_up(student: Any, teacher: Any) -> bool:
    try:
        return len(decoder_layers(student)) <= len(decoder_layers(teacher))
    except ValueError:
        return False


def _warn_of_unused_rows(rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens < _USED_ROWS * rows:
        logger.warning(
            f"The teacher has {rows} vocabulary rows, and its tokenizer, {tokenizer_name(tokenizer)}, tokens for "
            f"{tokens} of them: it may be another model's, which its loss does not always show."
        )


def _compare_with_students(given: PreTrainedTokenizerBase, student: Any) -> None:
    place = getattr(student.config, "_name_or_path", None)
    saved = find_tokenizer(place, None, local_only=True)
    if saved is not None:
        # Suspicious at most: it may have been given another vocabulary since.
        _compare_with_saved(given, saved, "student", readable_name(place), loaded=False)


def _compare_with_saved(
    given: PreTrainedTokenizerBase, saved: PreTrainedTokenizerBase, role: str, place: str | None, loaded: bool
) -> None:
    """Another tokenizer than the saved one is wrong for a model that was loaded, and suspicious for one at hand.

    Tokens that only one of them has are no contradiction: they may have been added, or given another name.
    """
    known = saved.get_vocab()
    moved = [(index, token) for token, index in given.get_vocab().items() if known.get(token, index) != index]
    if not moved:
        return
    index, token = min(moved)
    argument = "teacher_processing_class" if role == "teacher" else "processing_class"
    text = (
        f"{len(moved)} of the {len(given)} tokens of the `{argument}` have another id in the tokenizer "
        f"saved with the {role} {place}, such as {token!r}: {index} against {known[token]}"
    )
    if loaded:
        raise ValueError(
            f"{text}. It is another model's: leave it out, and the saved one is used. If you know better, load the "
            f"{role} yourself and pass it as a model."
        )
    logger.warning(f"{text}. If the {role} was not given another vocabulary since, it is another model's.")
