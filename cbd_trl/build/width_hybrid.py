"""Hybrids in width: `nested` models between the anchor above and the student as it is at that step.

The loss is taken on the hybrid, and its gradient flows through the interpolation to the student's parameters: the
student learns to be one end of the models between the two.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from cbd_trl.architectures import Architecture, decoder_layers
from cbd_trl.architectures.backbone import open_forward
from cbd_trl.chain.model import build_model
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.shapes.solve import solve_target
from cbd_trl.surgery.weights import to_state, to_weights
from cbd_trl.targets.operators import Pair, Plan, cut_upper, layer_stack, mixer
from cbd_trl.trainers.hybrid import Pass, drawn

# Sizes of the hybrids: shares of the way from the lower to the upper anchor, in parameters.
FRACTIONS = (0.25, 0.5, 0.75)
# How far from such a share a shape may lie: half the distance between two of them.
_TOLERANCE = 0.125


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


class WidthHybrid:
    """Models between the student and the anchor above, remade from the student's parameters on each hybrid step (see
    `Hybrid`).

    Memory besides student and teacher: the upper anchor cut to each target in float32, up to three times the teacher
    in all; on a hybrid step also the interpolated model and the activations of its pass, which are not checkpointed,
    because a recompute would find other weights.

    Args:
        pair: the anchor above and the student; the student's weights are not read here.
        probability: share of the optimizer steps that have a hybrid.
        seed: of the draws.

    Raises:
        ValueError: if no shape lies between the two.
    """

    def __init__(self, pair: Pair, probability: float, seed: int) -> None:
        upper, lower = pair.upper_architecture, pair.lower_architecture
        self._targets = [_Target(pair, Plan(target)) for target in targets_between(upper, lower, pair.blocks)]
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
        yield None if generator is None else generator.choice(self._targets).mixed_with(student.model)


class _Target:
    """One shape: a stock model that holds the upper anchor's fixed part, and the interpolation with the student."""

    def __init__(self, pair: Pair, plan: Plan) -> None:
        cut, self._architecture = cut_upper(pair, plan)
        self._student_architecture, self._mix = pair.lower_architecture, mixer(pair, plan)
        self.model: Any = build_model(self._architecture, cut, torch.float32).requires_grad_(False)
        self.model.config.use_cache = False
        open_forward(self.model)
        block_of = {layer: i for i, block in enumerate(pair.blocks) for layer in block}
        ends = {block_of[layer]: place for place, (_, layer) in enumerate(layer_stack(pair, plan))}
        modules = decoder_layers(self.model)
        self.layers = [(i, modules[place]) for i, place in ends.items()]

    def mixed_with(self, student: Any) -> Pass:
        """Make the pass through this target interpolated with the student's parameters, to which gradients flow.

        Args:
            student: a causal LM, not wrapped.
        """
        self._follow(student)
        cut = to_weights(dict(self.model.named_parameters()), self._architecture)
        lower = to_weights(dict(student.named_parameters()), self._student_architecture)
        mixed = to_state(self._mix(cut, lower), self._architecture)
        state = {name: tensor.to(student.dtype) for name, tensor in mixed.items()}
        return Pass(self.model, self._runner(state))

    def _runner(self, state: dict[str, torch.Tensor]) -> Callable[..., Any]:
        return lambda **inputs: functional_call(self.model, state, kwargs=inputs)

    def _follow(self, student: Any) -> None:
        """Match the student's device, mode and attention implementation."""
        self.model.to(student.device).train(student.training)
        attention = student.config._attn_implementation
        if self.model.config._attn_implementation != attention:
            self.model.set_attn_implementation(attention)
