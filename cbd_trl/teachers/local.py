"""Teachers that run in the training processes: loading and placing them, and their outputs for a batch.

Shapes: B batch rows, T tokens, R dataset rows, N scored positions, D width of the teacher.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator, cpu_offload
from torch import Tensor, nn
from transformers import PreTrainedModel

from cbd_trl.architectures.backbone import check_causal, check_head, open_forward, output_head, product_dtype
from cbd_trl.losses.reduction import Scored
from cbd_trl.losses.teacher_outputs import HiddenOutputs, MixtureOutputs
from cbd_trl.utils.formatting import readable_name
from cbd_trl.utils.model_folders import name_remote_code
from cbd_trl.utils.modeling import check_writes, in_eval_mode, is_spread, load_causal_lm

# The collator of a cached teacher puts what it read under names that begin so.
TEACHER_PREFIX = "teacher_"


@dataclass(frozen=True)
class Batch:
    """A collated batch, by who reads what.

    Attributes:
        inputs: of both models.
        labels_BT: token ids, -100 where the token is not scored.
        scored: its scored positions.
        row_lengths_R: tokens of each dataset row of a padding-free batch, or None.
        teacher: what the collator read of a teacher (cached, or with prompts or tokens of its own); else empty.
    """

    inputs: dict[str, Any]
    labels_BT: Tensor
    scored: Scored
    row_lengths_R: Tensor | None
    teacher: dict[str, Any]

    @classmethod
    def split(cls, collated: Mapping[str, Any]) -> "Batch":
        """Separate what the models read from what the loss reads.

        Args:
            collated: by the data collator of a trainer. Where "scored" is missing, because another collator made the
                batch, or because the labels were changed since and it was taken out, it is made here.
        """
        inputs = dict(collated)
        labels_BT, row_lengths_R = inputs.pop("labels"), inputs.pop("row_lengths", None)
        scored = inputs.pop("scored") if "scored" in inputs else Scored.of(labels_BT)
        teacher = {name: inputs.pop(name) for name in list(inputs) if name.startswith(TEACHER_PREFIX)}
        # A cache would only cost memory.
        return cls({**inputs, "use_cache": False}, labels_BT, scored, row_lengths_R, teacher)

    @property
    def for_teacher(self) -> "Batch":
        """What the teacher reads: the same, or rows with prompts of its own, which the collator has made."""
        if "teacher_scored" not in self.teacher:
            return self
        ids_RU, mask_RU, scored = (self.teacher[f"teacher_{name}"] for name in ("ids", "mask", "scored"))
        inputs = {"input_ids": ids_RU, "attention_mask": mask_RU, "use_cache": False}
        return Batch(inputs, ids_RU, scored, None, {})

    def count_tokens(self) -> Tensor:
        """Count the tokens that are not padding, scalar int64."""
        if self.row_lengths_R is not None:
            return self.row_lengths_R.sum()
        if (mask := self.inputs.get("attention_mask")) is not None:
            return mask.sum()
        ids = self.inputs["input_ids"]
        return torch.full((), ids.numel(), device=ids.device)


def load_teacher(
    teacher: PreTrainedModel | str,
    student: nn.Module,
    *,
    init_kwargs: dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load and check a teacher: a frozen model in eval mode.

    A model given in memory is changed in place: its parameters get no gradients and it stays in eval mode.

    Args:
        teacher: a causal LM, or the path or Hub id of one. Of a PEFT model, the base with its active adapters.
        student: the model being trained, which gives the defaults of dtype and attention implementation: equal
            attention keeps packed rows apart in both models.
        init_kwargs: of `from_pretrained`, for a path or Hub id; `quantization_config` among them.
        revision: of a Hub id.
        trust_remote_code: let a Hub model run its own code, which is named in a warning first.

    Returns:
        the teacher, not yet on a device.

    Raises:
        ValueError: if it is the student or shares parameters with it, if options for loading come with a model, if it
            has no logits or was saved without some weights, if the logits are not a plain head of its last hidden
            state or know what follows, or if it has virtual tokens in front of its inputs.
        TypeError: if it is neither a model nor a string.
        ImportError: if it is quantized, or is to be, by a package that is not installed.
    """
    if isinstance(teacher, str):
        teacher = _load(teacher, student, init_kwargs or {}, revision, trust_remote_code)
    elif not isinstance(teacher, nn.Module):
        raise TypeError(
            f"teacher_model is a {type(teacher).__name__}: it must be a causal language model, or the path "
            "or Hub id of one (or a list of them)."
        )
    elif init_kwargs or revision:
        raise ValueError(
            "teacher_model_init_kwargs and teacher_model_revision are for loading a teacher, but teacher_model is a "
            "model already: they would be ignored. Leave them out, or give the teacher's path or Hub id."
        )
    owned = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in owned for parameter in teacher.parameters()):
        raise ValueError(
            "The teacher shares parameters with the student: freezing the one would freeze the other. Give a copy, "
            "such as `copy.deepcopy(model)`, or set self_distillation=True to learn from the student's own base."
        )
    _check_no_virtual_tokens(teacher)
    model = causal_lm_of(teacher)
    check_writes(model, "teacher")
    model.eval()
    model.requires_grad_(False)
    open_forward(model)
    check_causal(model)
    check_head(model)
    return model


def _load(
    name: str, student: Any, init_kwargs: dict[str, Any], revision: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    kwargs: dict[str, Any] = {"dtype": student.dtype, "trust_remote_code": trust_remote_code}
    if attention := getattr(student.config, "_attn_implementation", None):
        kwargs["attn_implementation"] = attention
    if revision is not None:
        kwargs["revision"] = revision
    kwargs |= init_kwargs
    if kwargs["trust_remote_code"]:
        name_remote_code(name, kwargs.get("revision"), kwargs.get("token"))
    try:
        return load_causal_lm(name, role="teacher", adapters=True, **kwargs)
    except ImportError as error:
        if attention := init_kwargs.get("attn_implementation"):
            ways = f"or leave attn_implementation={attention!r} out of teacher_model_init_kwargs ('sdpa' always runs)"
        else:
            ways = (
                "which for a teacher in 4 or 8 bits is pip install 'cbd-trl[quantized]'; or leave "
                "`quantization_config` out of teacher_model_init_kwargs and load it whole"
            )
        raise ImportError(
            f"The teacher {readable_name(name)} needs a package that is not installed ({error}). Install it, {ways}."
        ) from error


def _check_may_be_spread(teacher: Any, processes: int, offload: bool) -> None:
    places = ", ".join(sorted({str(place) for place in teacher.hf_device_map.values()}))
    if processes > 1:
        raise ValueError(
            f"The teacher is spread by its device_map over {places}, and {processes} processes are trained in, each "
            "of which needs a whole teacher and has one device. Start one process; or leave device_map out, and have "
            "the teacher sharded with the student (FSDP, DeepSpeed) or set teacher_offload=True."
        )
    if offload:
        raise ValueError(
            f"teacher_offload=True keeps the teacher in the CPU's memory, and its device_map puts it on {places}: "
            "there can be one of the two. Leave one of them out."
        )


def causal_lm_of(model: Any) -> Any:
    """Find the causal LM inside a PEFT model, whose adapters are in its layers.

    Args:
        model: a causal LM, or a PEFT model around one.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_no_virtual_tokens(teacher: Any) -> None:
    adapter = getattr(teacher, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise ValueError(
            f"The teacher has a {type(adapter).__name__}, which puts virtual tokens in front of its inputs, where the "
            "student has none. Give a teacher without it, or with an adapter that leaves the inputs alone, such as "
            "LoRA."
        )


class Teacher(Protocol):
    """What the trainer needs of every teacher."""

    @property
    def models(self) -> Sequence[PreTrainedModel]:
        """The causal LMs that run beside the student."""

    def place(self, accelerator: Accelerator, offload: bool = False) -> None:
        """See `LocalTeacher.place`."""

    def predict(self, batch: Batch, student: nn.Module) -> Any:
        """See `LocalTeacher.predict`; `TeacherOutputs` where its tokens are the student's."""


class LocalTeacher:
    """A frozen causal LM.

    Args:
        model: what `load_teacher` returned.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._placed: nn.Module = model

    @property
    def models(self) -> Sequence[PreTrainedModel]:
        """The teacher."""
        return [self.model]

    def place(self, accelerator: Accelerator, offload: bool = False) -> None:
        """Put the teacher where the student is: on its device, sharded and in mixed precision like it.

        One that a `device_map` spread over devices, or offloaded, stays there; what it returns is brought over.

        Args:
            accelerator: the trainer's.
            offload: keep the parameters in the CPU's memory and bring each layer to the device when it runs.

        Raises:
            ValueError: it is spread over devices that the other processes of the training need, or that are not where
                `offload` would have it.
        """
        if is_spread(self.model):
            _check_may_be_spread(self.model, accelerator.num_processes, offload)
        if offload:
            cpu_offload(self.model, execution_device=accelerator.device)
        if accelerator.state.deepspeed_plugin is not None:
            from trl.models.utils import prepare_deepspeed

            placed = prepare_deepspeed(self.model, accelerator)
        elif getattr(accelerator.state, "fsdp_plugin", None) is not None:
            from trl.models.utils import prepare_fsdp

            placed = prepare_fsdp(self.model, accelerator)
        else:
            placed = accelerator.prepare_model(self.model, device_placement=not offload, evaluation_mode=True)
        placed.eval()
        self._placed = placed

    def predict(self, batch: Batch, student: nn.Module) -> HiddenOutputs:
        """Compute the teacher's output at the scored positions of a batch.

        Args:
            batch: of B rows of T tokens.
            student: as wrapped for training; only a teacher that lives in it needs it.

        Returns:
            its last hidden states at the N scored positions, and its head.
        """
        return read_hidden(self._placed, self.model, batch)


class EnsembleTeacher:
    """Several teachers whose next-token distributions are averaged (Baby Llama, arXiv 2308.02019).

    Args:
        members: the teachers.
        weights: of their distributions, summing to 1.
    """

    def __init__(self, members: Sequence[LocalTeacher], weights: Sequence[float]) -> None:
        self.members = members
        self._weights = weights

    @property
    def models(self) -> Sequence[PreTrainedModel]:
        """The teachers."""
        return [member.model for member in self.members]

    def place(self, accelerator: Accelerator, offload: bool = False) -> None:
        """See `LocalTeacher.place`."""
        for member in self.members:
            member.place(accelerator, offload)

    def predict(self, batch: Batch, student: nn.Module) -> MixtureOutputs:
        """See `LocalTeacher.predict`."""
        return MixtureOutputs([member.predict(batch, student) for member in self.members], self._weights)


class OwnBaseTeacher:
    """The student with its adapter switched off: what it was before it was trained.

    Args:
        student: a PEFT model, not wrapped.
    """

    def __init__(self, student: Any) -> None:
        self._student = student

    @property
    def models(self) -> Sequence[PreTrainedModel]:
        """None: it is the student."""
        return []

    def place(self, accelerator: Accelerator, offload: bool = False) -> None:
        """The student is placed by the trainer."""

    def predict(self, batch: Batch, student: nn.Module) -> HiddenOutputs:
        """See `LocalTeacher.predict`. In eval mode: dropout is for the student, and so is gradient checkpointing."""
        with in_eval_mode(student), self._student.disable_adapter():
            return read_hidden(student, self._student.get_base_model(), batch)


@torch.no_grad()
def read_hidden(placed: nn.Module, model: Any, batch: Batch) -> HiddenOutputs:
    """Run a model up to its last hidden state and keep the scored positions.

    Args:
        placed: the model to call, wrapped or not.
        model: the causal LM itself, its forward opened.
        batch: of B rows of T tokens.

    Returns:
        hidden states (N, D) and head, both on the device of the labels and in the dtype in which they are multiplied.
    """
    batch = batch.for_teacher
    return placed(**batch.inputs, inside=_ReadHidden(model, batch.scored))


@dataclass(frozen=True)
class _ReadHidden:
    model: Any
    scored: Scored

    def __call__(self, hidden_BTD: Tensor) -> HiddenOutputs:
        # The last layer and the head of a model that is spread are where its `device_map` put them.
        device = self.scored.index_N.device
        hidden_ND = self.scored.select(hidden_BTD)
        with output_head(self.model, keep=True) as head:
            dtype = product_dtype(head, device)
            return HiddenOutputs(hidden_ND.to(device, dtype), head.to(dtype).to(device))
