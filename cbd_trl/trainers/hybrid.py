"""Hybrids: models between student and teacher that are trained beside the student, by the same loss.

A pass through one trains what it has of the student, so that the student's weights work together with the teacher's:
what a model between two anchors is made of. Where two models differ in depth alone, the teacher's
frozen layers stand in for some blocks of the student; other kinds are given to `DistillTrainer` by whoever knows how
to make them.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import create_masks_for_generate

from cbd_trl.architectures import decoder_layers

# Types whose masks follow from the batch, whatever type the layer is that they stand in for.
_KNOWN = {"full_attention", "sliding_attention", "linear_attention", "conv"}


def layer_types_of(model: Any) -> list[str]:
    """Find how each layer attends, such as "full_attention"."""
    return _layer_types(model.config.get_text_config())


def _layer_types(config: Any) -> list[str]:
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


def check_layer_types(student_config: Any, teacher_config: Any, block_map: Sequence[Sequence[int]]) -> None:
    """Check that the layers of every block can be called in the student.

    Args:
        student_config: text config of the student.
        teacher_config: text config of the teacher.
        block_map: for each student layer the consecutive teacher layers it stands for.

    Raises:
        ValueError: naming a block with layers of other types than its student layer, where not all of these go
            together.
    """
    ours, theirs = _layer_types(student_config), _layer_types(teacher_config)
    for i, block in enumerate(block_map):
        types = {theirs[j] for j in block}
        if types != {ours[i]} and not types | {ours[i]} <= _KNOWN:
            raise ValueError(
                f"swap_probability: student layer {i} uses {ours[i]}, the teacher's layers {list(block)} that it "
                f"stands for use {sorted(types)}, and only {', '.join(sorted(_KNOWN))} go together in one block. Set "
                "swap_probability=0, or choose blocks of one layer type."
            )


class LayerInputs:
    """The inputs of a teacher's layers, which may attend otherwise than the student's, while the student runs.

    Args:
        student: the model being trained, not wrapped.
        teacher: the frozen teacher, not wrapped.
    """

    def __init__(self, student: Any, teacher: Any) -> None:
        self._student, self._teacher = student, teacher
        self._masks: dict[str, Any] = {}

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Within it the student makes the masks of the teacher's layer types as well as its own."""
        handle = self._student.base_model.register_forward_pre_hook(self._prepare, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._masks = {}

    def _prepare(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        inputs = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        assert isinstance(inputs, Tensor)
        # Only shape, dtype and device of the embeddings are looked at.
        like = torch.empty((*inputs.shape[:2], 0), dtype=self._student.dtype, device=inputs.device)
        given, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        models = (self._teacher, self._student)
        found = [create_masks_for_generate(model.config, like, given, None, positions) for model in models]
        self._masks = {**found[0], **found[1]}
        return args, {**kwargs, "attention_mask": self._masks}

    def kwargs(self, layer_type: str, hidden_BTD: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        """Make the arguments that a layer of this type is called with.

        Args:
            layer_type: how it attends, such as "sliding_attention".
            hidden_BTD: the stream in front of it.
            given: what the student calls its own layer with.
        """
        own = {**given, "attention_mask": self._masks[layer_type]}
        config = self._teacher.config.get_text_config()
        if layer_type in (config.rope_parameters or {}):
            own["position_embeddings"] = self._teacher.base_model.rotary_emb(
                hidden_BTD, given["position_ids"], layer_type
            )
        return own


# Fields that must agree because a layer of the teacher gets the student's rotary embeddings and attention masks.
_SHARED_FIELDS = ("model_type", "hidden_size", "head_dim", "rope_parameters", "sliding_window", "_attn_implementation")


@dataclass(frozen=True)
class Pass:
    """What one forward of a step runs through.

    Attributes:
        model: a causal LM with an opened forward (see `open_forward`), not wrapped: whose head the loss multiplies by.
        run: what is called for its forward: the model itself, or what wraps it or lends it its weights.
    """

    model: Any
    run: Callable[..., Any]


class Hybrid(Protocol):
    """A kind of hybrids. What a step gets depends on the step alone (and on a seed): every micro-batch of a step and
    every process gets the same hybrid, and a resumed run the same as an uninterrupted one."""

    @property
    def layers(self) -> Iterable[tuple[int, nn.Module]]:
        """Modules beside the student's own layers whose output is that of student layer i in a hybrid: (i, module)."""
        ...

    def at(self, step: int, student: Pass) -> AbstractContextManager[Pass | None]:
        """Within it a hybrid can be run, on a step that has one.

        Args:
            step: optimizer steps done so far.
            student: the student as it is run in training.

        Returns:
            a context that yields the pass through the hybrid, or None.
        """
        ...


def drawn(step: int, seed: int, probability: float) -> random.Random | None:
    """Decide whether a step has a hybrid.

    Args:
        step: optimizer steps done so far.
        seed: of the draws.
        probability: share of the steps that have one.

    Returns:
        what its kind is to be drawn from; None on a step without one.
    """
    generator = random.Random(f"{seed}:{step}")
    return generator if generator.random() < probability else None


class TeacherBlock(nn.Module):
    """The consecutive teacher layers one student layer stands for, called like that layer.

    Args:
        layers: decoder layers of the teacher.
        layer_types: how each of them attends.
        inputs: what layers are called with that attend otherwise than the student's; None where there are none.
    """

    def __init__(self, layers: list[nn.Module], layer_types: list[str], inputs: LayerInputs | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._layer_types, self._inputs = layer_types, inputs
        # As the layer whose place it takes: those of the teacher are not.
        self.checkpointed = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layers one after the other.

        Args:
            hidden_states: (B, T, D).
            args: as the student passes them to its own layer.
            kwargs: as the student passes them to its own layer.

        Returns:
            what the last layer returns: a tensor (B, T, D), or a tuple that starts with one.
        """
        output: Any = hidden_states
        for layer, layer_type in zip(self.layers, self._layer_types, strict=True):
            hidden_states = output[0] if isinstance(output, tuple) else output
            own = kwargs if self._inputs is None else self._inputs.kwargs(layer_type, hidden_states, kwargs)
            if self.checkpointed:
                output = checkpoint(layer, hidden_states, *args, use_reentrant=False, **own)
            else:
                output = layer(hidden_states, *args, **own)
        return output


class BlockHybrid:
    """Swaps blocks of a student for the teacher's, one forward at a time; needs models that differ in depth alone.

    Args:
        student: the model being trained, not wrapped.
        teacher: the frozen teacher, not wrapped.
        block_map: for each student layer the consecutive teacher layers it stands for.
        costs: for each student layer what it costs that it stands for them: the costliest are swapped, as in models
            between the two; None = unknown, the last are.
        probability: share of the optimizer steps that have a hybrid.
        seed: of the draws.

    Raises:
        ValueError: if no block stands for more than one layer.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        block_map: list[list[int]],
        probability: float,
        seed: int,
        costs: Sequence[float] | None = None,
    ) -> None:
        self._student, theirs = decoder_layers(student), decoder_layers(teacher)
        ours, types = layer_types_of(student), layer_types_of(teacher)
        mixed = any(types[j] != ours[i] for i, block in enumerate(block_map) for j in block)
        self._inputs = LayerInputs(student, teacher) if mixed else None
        self.blocks = {
            i: TeacherBlock([theirs[j] for j in block], [types[j] for j in block], self._inputs)
            for i, block in enumerate(block_map)
            if len(block) > 1
        }
        if not self.blocks:
            raise ValueError(
                f"swap_probability={probability}, but student and teacher have {len(self._student)} layers each: no "
                "student layer stands for several of the teacher's. Set swap_probability=0 for a pair that differs in "
                "width, or let `build_chain` train it."
            )
        self._order = sorted(self.blocks, reverse=True)
        if costs is not None:
            self._order.sort(key=lambda i: costs[i] / (len(block_map[i]) - 1), reverse=True)
        self._probability = probability
        self._seed = seed

    def draw(self, step: int) -> list[int]:
        """Draw the student layers that are swapped at an optimizer step.

        Args:
            step: optimizer steps done so far.

        Returns:
            the first k in order of the layers that stand for several teacher layers, k uniform in 1..all; empty on a
            step without a hybrid.
        """
        generator = drawn(step, self._seed, self._probability)
        if generator is None:
            return []
        return sorted(self._order[: generator.randint(1, len(self._order))])

    @property
    def layers(self) -> Iterable[tuple[int, nn.Module]]:
        """As in `Hybrid`."""
        return self.blocks.items()

    @contextmanager
    def at(self, step: int, student: Pass) -> Iterator[Pass | None]:
        """As in `Hybrid`: the student itself, with other layers.

        Args:
            step: as there.
            student: as there.

        Yields:
            as there.
        """
        with self.swapped(step) as indices:
            yield student if indices else None

    @contextmanager
    def swapped(self, step: int) -> Iterator[list[int]]:
        """Within it the student runs with the blocks of `draw(step)`; afterwards it is itself again.

        Args:
            step: optimizer steps done so far.

        Yields:
            the swapped layers.
        """
        indices = self.draw(step)
        originals = {i: self._student[i] for i in indices}
        try:
            for i in indices:
                self.blocks[i].checkpointed = getattr(originals[i], "gradient_checkpointing", False)
                self._student[i] = self.blocks[i]
            with self._inputs.prepared() if self._inputs and indices else nullcontext():
                yield indices
        finally:
            for i, layer in originals.items():
                self._student[i] = layer


def check_swappable(student_config: Any, teacher_config: Any, block_map: list[list[int]]) -> None:
    """Check that the layers of two models can stand in for each other.

    Args:
        student_config: text config of the student.
        teacher_config: text config of the teacher.
        block_map: for each student layer the consecutive teacher layers it stands for.

    Raises:
        ValueError: naming the first field that differs, or the block whose layers attend differently.
    """
    for name in _SHARED_FIELDS:
        ours, theirs = (_field(config, name) for config in (student_config, teacher_config))
        if ours != theirs:
            raise ValueError(
                "swap_probability needs two models of one chain that differ in depth alone (`build_chain` has hybrids "
                f"for widths), but {name} is {ours!r} in the student and {theirs!r} in the teacher: the teacher's "
                "layers cannot run inside the student. Set swap_probability=0."
            )
    check_layer_types(student_config, teacher_config, block_map)


def check_together(student: Any, teacher: Any) -> None:
    """Check that the layers of two models can run in one pass: on one device.

    Args:
        student: not wrapped.
        teacher: not wrapped.

    Raises:
        ValueError: a `device_map` spread one of them over several devices.
    """
    for role, model in (("student", student), ("teacher", teacher)):
        # What is offloaded runs on the one device that is left.
        places = {str(place) for place in getattr(model, "hf_device_map", {}).values()} - {"cpu", "disk"}
        if len(places) > 1:
            raise ValueError(
                f"swap_probability runs layers of the teacher inside the student, and the {role} is spread by its "
                f"device_map over {', '.join(sorted(places))}. Load it on one device (device_map={{'': 0}}), or set "
                "swap_probability=0."
            )


def _field(config: Any, name: str) -> Any:
    if name == "head_dim":
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return getattr(config, name, None)
