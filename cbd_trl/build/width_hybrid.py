"""Hybrids in width: `nested` models between the anchor above and the student as it is at that step.

The loss is taken on the hybrid, and its gradient flows through the interpolation to the student's parameters: the
student learns to be one end of the models between the two.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from cbd_trl.architectures import Architecture, Site, decoder_layers
from cbd_trl.architectures.backbone import open_forward
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.shapes.solve import solve_target
from cbd_trl.shapes.spread import spread_targets
from cbd_trl.surgery.least_squares import Fit
from cbd_trl.surgery.weights import LazyWeights, Weights, to_state, to_weights
from cbd_trl.targets.operators import Pair, Plan, cut_upper, layer_stack, mixer, patch, upper_fits
from cbd_trl.trainers.hybrid import Pass, drawn

# Sizes of the hybrids: shares of the way from the lower to the upper anchor, in parameters.
FRACTIONS = (0.25, 0.5, 0.75)
# How far from such a share a shape may lie: half the distance between two of them.
_TOLERANCE = 0.125
# The same of `many_targets_between`, and how many shapes it takes at each.
_MANY_FRACTIONS = (0.1, 0.25, 0.5, 0.75)
_NEAR = 0.05
_SHAPES = 3


def targets_between(
    upper: Architecture, lower: Architecture, block_map: Sequence[Sequence[int]]
) -> list[Architecture]:
    """The targets of `from_chain` nearest to `FRACTIONS` of the way between two anchors.

    Args:
        upper, lower: architectures of the two.
        block_map: for each lower layer the upper layers it stands for.

    Returns:
        One shape for each fraction that has one near it; none where no shape lies between the two.
    """
    small, span = lower.num_parameters, upper.num_parameters - lower.num_parameters
    targets = []
    for fraction in FRACTIONS:
        wanted = small + fraction * span
        try:
            fields = solve_target(upper, lower, block_map, wanted, tolerance=_TOLERANCE * span / wanted)
        except ValueError:  # no shape there
            continue
        targets.append(cut_architecture(upper, fields))
    return targets


def many_targets_between(
    upper: Architecture, lower: Architecture, block_map: Sequence[Sequence[int]]
) -> list[Architecture]:
    """List more targets than `targets_between`: also near the lower anchor, and of shapes that are not on the line.

    Args:
        upper, lower, block_map: as there.

    Returns:
        Up to `_SHAPES` shapes for each of `_MANY_FRACTIONS`; none where no shape lies between the two.
    """
    small, span = lower.num_parameters, upper.num_parameters - lower.num_parameters
    found: list[dict[str, int]] = []
    for fraction in _MANY_FRACTIONS:
        wanted = small + fraction * span
        try:
            found += spread_targets(upper, lower, block_map, wanted, _SHAPES, _NEAR * span / wanted)
        except ValueError:  # no shape there
            continue
    ends = (upper.shape, lower.shape)
    shapes = [fields for i, fields in enumerate(found) if fields not in ends and fields not in found[:i]]
    return [cut_architecture(upper, fields) for fields in shapes]


class WidthHybrid:
    """Models between the student and the anchor above, remade from the parameters of the two on each hybrid step (see
    `Hybrid`).

    No weight of a hybrid is kept. Those of a layer are made when the layer runs, and once more for its gradient, from
    the tensors of `pair.upper` and of the student that are there anyway; those around the layers live as long as a
    pass. What is kept is what the least-squares cut has computed from the statistics, in the CPU's memory, and on the
    device that of one target alone. With gradient checkpointing of the student, so are the hybrid's activations.

    Args:
        pair: the anchor above and the student; the student's weights are not read here. The upper ones are read at
            every step and best lie on the student's device (see `weights_of_teacher`).
        probability: share of the optimizer steps that have a hybrid.
        seed: of the draws.
        shapes: of the hybrids; None for `targets_between`.

    Raises:
        ValueError: if no shape lies between the two.
    """

    def __init__(
        self, pair: Pair, probability: float, seed: int, shapes: Sequence[Architecture] | None = None
    ) -> None:
        upper, lower = pair.upper_architecture, pair.lower_architecture
        shapes = targets_between(upper, lower, pair.blocks) if shapes is None else shapes
        self._targets = [MixedModel(pair, Plan(shape)) for shape in shapes]
        if not self._targets:
            raise ValueError(
                f"swap_probability={probability} trains models between {upper.shape} and {lower.shape}, and no shape "
                "lies between the two. Set swap_probability=0, or make the lower anchor smaller."
            )
        self._probability, self._seed = probability, seed

    @property
    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        """As in `Hybrid`."""
        for target in self._targets:
            yield from target.layers

    @contextmanager
    def at(self, step: int, student: Pass) -> Iterator[Pass | None]:
        """As in `Hybrid`: one of the targets, drawn evenly.

        Args:
            step: as there.
            student: as there; without an adapter.

        Yields:
            as there.
        """
        generator = drawn(step, self._seed, self._probability)
        target = None if generator is None else generator.choice(self._targets)
        for other in self._targets:
            if other is not target:
                other.release()
        yield None if target is None else target.mixed_with(student.model)


def weights_of_teacher(teacher: Any, architecture: Architecture, stored: Weights) -> Weights:
    """View the parameters of a teacher as weights, wherever they are at the time when they are read.

    Args:
        teacher: a causal LM, not wrapped.
        architecture: of it.
        stored: the same weights, read instead where the teacher's parameters are not at hand: offloaded ones.
    """
    held, table = parameters_of(teacher, architecture), f"{architecture.family.embedding}.weight"

    def tensor(key: str) -> Tensor:
        # A gain that no model of the family stores is made where the table is.
        name = architecture.stored[key][0] if key in architecture.stored else table
        offloaded = teacher.get_parameter(name).is_meta
        return (stored if offloaded else held)[key].detach()

    return LazyWeights(architecture.tensors, tensor)


def parameters_of(model: Any, architecture: Architecture) -> Weights:
    """View the parameters of a model, not wrapped, as weights through which gradients flow to it."""
    return to_weights(LazyWeights(architecture.state_shapes, model.get_parameter), architecture)


class _Stock(nn.Module):
    """A layer whose own forward was replaced, with the one of its class."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.layer).forward(self.layer, *args, **kwargs)


class MixedModel:
    """A target between two anchors that is trained: a stock model without weights, and what lends it those that
    `nested` makes of the upper anchor and the lower one as they are, before its norms are balanced.

    Args:
        pair: as in `WidthHybrid`; of equal widths too.
        plan: the shape.
        upper: the weights of the upper anchor that gradients flow to, if it is trained too. Of `pair.upper` the gains
            are read then, on which what the cut computes depends: it stays as it is, whenever it is computed.
    """

    def __init__(self, pair: Pair, plan: Plan, upper: Weights | None = None) -> None:
        self._fits, self._placed = {} if pair.equal_widths else upper_fits(pair, plan), dict[tuple[Site, bool], Fit]()
        self._device, self._dtype = torch.device("cpu"), torch.float32
        read = pair.upper if upper is None else upper
        placed = LazyWeights(read, lambda key: read[key].to(self._device))
        self._mix, self._architecture = self._mixing(dataclasses.replace(pair, upper=placed), plan)
        self._student_architecture = pair.lower_architecture
        self._student: Any = None
        self.model: Any = _without_weights(self._architecture)
        open_forward(self.model)
        modules = decoder_layers(self.model)
        block_of = {layer: i for i, block in enumerate(pair.blocks) for layer in block}
        ends = {block_of[layer]: place for place, (_, layer) in enumerate(layer_stack(pair, plan))}
        self.layers = [(i, modules[place]) for i, place in ends.items()]
        # In an order, because sums of gradients are rounded in theirs.
        # Constants are buffers, which the model has.
        constants = self._architecture.constants
        self._outside = dict.fromkeys(name for name in self._architecture.state_shapes if name not in constants)
        for prefix, module in self.model.named_modules():
            if any(module is layer for layer in modules):
                names = [name for name in self._outside if name.startswith(f"{prefix}.")]
                for name in names:
                    del self._outside[name]
                own = {f"layer{name.removeprefix(prefix)}": name for name in names}
                module.forward = partial(self._run_layer, _Stock(module), own)

    def _mixing(self, pair: Pair, plan: Plan) -> tuple[Callable[[Weights], Weights], Architecture]:
        """Build the function that makes the weights from those of the lower anchor."""
        if pair.equal_widths:
            return lambda lower: patch(dataclasses.replace(pair, lower=lower), plan)[0], patch(pair, plan)[1]
        (cut, architecture), mix = cut_upper(pair, plan, self._fit), mixer(pair, plan)
        return lambda lower: mix(cut, lower), architecture

    def mixed_with(self, student: Any) -> Pass:
        """Make the pass through this target interpolated with the student's parameters, to which gradients flow.

        The gradient has to be taken before the next pass.

        Args:
            student: a causal LM, not wrapped.
        """
        self._student = student
        self._checkpointed = getattr(decoder_layers(student)[0], "gradient_checkpointing", False)
        lower = parameters_of(student, self._student_architecture)
        self._state = to_state(self._mix(lower), self._architecture)
        self._follow(student)
        return Pass(self.model, self._run)

    def release(self) -> None:
        """Let go of what is on the device."""
        self._placed.clear()

    def _run(self, **inputs: Any) -> Any:
        device, dtype = self._student.device, self._student.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        if (device, dtype) != (self._device, self._dtype):
            self._placed.clear()
            self._device, self._dtype = device, dtype
        return functional_call(self.model, {name: self._made(name) for name in self._outside}, kwargs=inputs)

    def _run_layer(self, layer: _Stock, names: Mapping[str, str], *args: Any, **kwargs: Any) -> Any:
        """Run a layer with weights that are made now, and made again for the gradient.

        Args:
            layer: the layer.
            names: {name of a parameter in it: name in the model}.
            args, kwargs: as the model calls its layer.
        """
        checkpointed = self.model.training and self._checkpointed

        def run(*args: Any, **kwargs: Any) -> Any:
            state = {own: self._made(name) for own, name in names.items()}
            # What is checkpointed runs again as a whole.
            kept = nullcontext() if checkpointed else self._kept_by_name({names[own]: t for own, t in state.items()})
            with kept:
                return functional_call(layer, state, args, kwargs)

        return checkpoint(run, *args, use_reentrant=False, **kwargs) if checkpointed else run(*args, **kwargs)

    def _made(self, name: str) -> Tensor:
        """Make a parameter: a matrix of a layer in the dtype of its products, all others in the student's dtype.

        Under autocast a product would round its matrix to the same values.
        """
        # What is made again for the gradient is made outside of autocast.
        with torch.autocast(self._device.type, enabled=False):
            tensor = self._state[name]
        return tensor.to(self._dtype if self._is_matrix(name) else self._student.dtype)

    def _is_matrix(self, name: str) -> bool:
        return name not in self._outside and len(self._architecture.state_shapes[name]) > 1

    def _kept_by_name(self, state: Mapping[str, Tensor]) -> saved_tensors_hooks:
        """Within it autograd keeps of the matrices among these their names, and gets them made again."""
        names = {_memory(tensor): name for name, tensor in state.items() if self._is_matrix(name)}

        def keep(tensor: Tensor) -> Any:
            name = names.get(_memory(tensor))
            return tensor if name is None else (name, tensor.shape, tensor.stride(), tensor.storage_offset())

        def find(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            name, *view = kept
            with torch.no_grad():
                return self._made(name).as_strided(*view)

        return saved_tensors_hooks(keep, find)

    def _fit(self, site: Site, intercept: bool) -> Fit:
        key = site, intercept
        if key not in self._placed:
            self._placed[key] = self._fits[key].to(self._device, self._dtype)
        return self._placed[key]

    def _follow(self, student: Any) -> None:
        """Match the student's device, mode and attention implementation."""
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(student.device)
        self.model.train(student.training)
        attention = student.config._attn_implementation
        if self.model.config._attn_implementation != attention:
            self.model.set_attn_implementation(attention)


def _without_weights(architecture: Architecture) -> Any:
    """A stock model whose parameters are on the meta device; its buffers are real."""
    config = copy.deepcopy(architecture.config)
    config.use_cache = False
    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with init_empty_weights(include_buffers=False):
        model = cls(config)
    # Moving to the meta device parts what was tied.
    model.tie_weights()
    return model.requires_grad_(False).eval()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
