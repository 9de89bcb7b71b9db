"""Refit a cut model to the residual stream of the whole one: a far better start for distillation than the cut."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cbd_trl.architectures import Architecture, decoder_layers
from cbd_trl.surgery.experts import routed_rows
from cbd_trl.surgery.statistics import cholesky, normalize_stream
from cbd_trl.surgery.weights import as_stored, as_used, from_input_matrix, input_matrix
from cbd_trl.utils.progress import Progress

# What a layer is called with besides the stream: masks, positions.
Call = tuple[tuple[Any, ...], dict[str, Any]]
# Best of 1e-2, 0.1, 0.4 and 1.5 on 6k tokens of SmolLM2-135M (30 -> 16 layers, and 576 -> 384 channels).
RIDGE = 0.1


@torch.no_grad()
def refit_layers(
    student: nn.Module,
    teacher: nn.Module,
    architecture: Architecture,
    blocks: Sequence[Sequence[int]],
    batches: Sequence[Mapping[str, torch.Tensor]],
    ridge: float = RIDGE,
) -> None:
    """Change each student layer's FFN output projection so that the layer ends where the teacher's block ends.

    Layer by layer from the first: with h the input of the output projection W, s the layer's output in the student
    (whose layers below are refitted already) and t the teacher's stream at the end of the block on the channels they
    share, W moves by E[(t - s) h^T] (E[h h^T] + ridge)^-1 and its bias, where it has one, by the mean that is left.
    Tokens are weighted by 1 / |t|. Where a norm with gain g follows W, W is fitted for what the norm divides by now,
    h / rms(W h) and (t - s) / g standing for h and t - s; then the gain is fitted to what the norm gives. Of a mixture
    of experts one matrix after another is fitted, to what those before it leave of t - s for its tokens.

    Args:
        student: a model cut from the teacher, in depth, width or both; changed in place.
        teacher: the model it was cut from.
        architecture: the student's.
        blocks: for each student layer the teacher layers it stands for.
        batches: model inputs of calibration text, without padding.
        ridge: times the mean diagonal of E[h h^T].

    Raises:
        ValueError: there are no batches.
    """
    ours, theirs = decoder_layers(student), decoder_layers(teacher)
    streams, calls, targets = [], [], []
    for batch in Progress("Recording the layers to refit", batches):
        into, layer_calls = layer_inputs(student, ours, batch)
        streams.append(into[0])
        calls.append(layer_calls)
        width = into[0].shape[-1]
        ends = block_ends(teacher, theirs, [block[-1] for block in blocks], batch)
        targets.append([end[..., :width] for end in ends])
    if not streams:
        raise ValueError("There is no calibration text to refit the layers on. Give at least one batch.")
    for i, layer in enumerate(Progress("Refitting layers", ours)):
        layer_calls = [call[i] for call in calls]
        goals = [target[i] for target in targets]
        streams = refit_layer(output_projection(layer, i, architecture), streams, layer_calls, goals, ridge)


def refit_layer(
    ffn: "OutputProjection",
    streams: Sequence[torch.Tensor],
    calls: Sequence[Call],
    goals: Sequence[torch.Tensor],
    ridge: float = RIDGE,
) -> list[torch.Tensor]:
    """Refit one layer in place, as `refit_layers` does.

    Args:
        ffn: its FFN output projection.
        streams: what the layer reads, (B, T, D) for each batch.
        calls: what else it is called with.
        goals: where it is to end, (B, T, D).

    Returns:
        where it ends now, (B, T, D).
    """
    inner, projected, outputs = [], [], []
    for stream, (args, kwargs) in zip(streams, calls, strict=True):
        with recorded_calls(ffn.module) as recorded:
            outputs.append(tensor_of(ffn.layer(stream, *args, **kwargs)).flatten(0, -2))
        inputs, result = recorded[0]
        inner.append(inputs)
        projected.append(result.flatten(0, -2))
    flat = [goal.flatten(0, -2).float() for goal in goals]
    before = [ffn.added(rows) for rows in projected]
    gaps = [goal - output.float() for goal, output in zip(flat, outputs, strict=True)]
    weights = [_token_weights(goal) for goal in flat]
    ffn.fit(inner, projected, gaps, weights, ridge)
    projected = [ffn.module(*inputs).flatten(0, -2) for inputs in inner]
    if ffn.norm is not None:
        ffn.fit_gain(projected, [gap + old.float() for gap, old in zip(gaps, before, strict=True)], weights)
    return [
        (output + ffn.added(rows) - old).view_as(stream)
        for output, rows, old, stream in zip(outputs, projected, before, streams, strict=True)
    ]


class OutputProjection:
    """The FFN output projection of one layer of a model, with the norm that may follow it.

    N rows: tokens of a batch. The projection makes (N, D) of (N, F), and the norm of that what the FFN adds to the
    stream.
    """

    def __init__(self, layer: nn.Module, index: int, architecture: Architecture) -> None:
        self.layer, self._architecture = layer, architecture
        self._site = next(site for site in architecture.family.sites if site.axis == ("ffn",))
        name = self._site.readers[0]
        self._key = architecture.layer_name(index, f"{name}.weight")
        # Experts have one module for all their projections.
        self.module: Any = layer.get_submodule(self._site.name if self._site.routed else name)
        norm = architecture.family.output_norms(architecture.config).get(name)
        self._norm_key = architecture.layer_name(index, f"{norm}.weight")
        self.norm: Any = None if norm is None else layer.get_submodule(norm)

    def added(self, projected: torch.Tensor) -> torch.Tensor:
        """Compute what the FFN adds to the stream, (N, D), from the output of the projection."""
        return projected if self.norm is None else self.norm(projected)

    def fit(
        self,
        inner: Sequence[tuple[torch.Tensor, ...]],
        projected: Sequence[torch.Tensor],
        gaps: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        ridge: float,
    ) -> None:
        """Move the projection so that what is added changes by the gaps, in weighted least squares."""
        sums: dict[str, torch.Tensor] = {}
        for inputs, result, gap, weight in zip(inner, projected, gaps, weights, strict=True):
            rows = inputs[0].flatten(0, -2)
            if self.norm is not None:
                rms = (result.float().pow(2).mean(-1, keepdim=True) + self._architecture.eps).sqrt()
                gain = as_used(self._norm_key, self.norm.weight, self._architecture).float()
                # gap / gain, but next to nothing for a channel with next to no gain.
                rows, gap = rows / rms, gap * gain / (gain.square() + ridge * gain.square().mean())
            _add_moments(sums, rows.float(), gap, weight)
        change, shift = _solve(sums, ridge, intercept=self.module.bias is not None)
        axes, weight = self._architecture.tensors[self._key], self.module.weight
        matrix = input_matrix(weight, axes, self._site.axis)
        weight.copy_(from_input_matrix(matrix + change.to(matrix.dtype), weight, axes, self._site.axis))
        if self.module.bias is not None:
            self.module.bias.add_(shift.to(weight.dtype))

    def fit_gain(
        self, projected: Sequence[torch.Tensor], goals: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
    ) -> None:
        """Set each gain of the norm so that what is added is nearest to the goals, in weighted least squares."""
        above = below = torch.zeros(())
        for rows, goal, weight in zip(projected, goals, weights, strict=True):
            stream = normalize_stream(rows, "rms", self._architecture.eps)
            above = above + (weight * stream * goal).sum(0)
            below = below + (weight * stream.square()).sum(0)
        gain = above / below.clamp(min=1e-12)
        self.norm.weight.copy_(as_stored(self._norm_key, gain, self._architecture))


class ExpertProjections(OutputProjection):
    """The output projections of the experts of one layer.

    Together they are one linear map of all experts' neurons, which are 0 for the tokens that an expert does not see,
    and are fitted one by one, as there are too many to solve for at once.
    """

    def fit(
        self,
        inner: Sequence[tuple[torch.Tensor, ...]],
        projected: Sequence[torch.Tensor],
        gaps: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        ridge: float,
    ) -> None:
        """Move the projections so that what is added changes by the gaps, in weighted least squares."""
        total = sum(weight.sum() for weight in weights)
        parts: dict[int, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
        for batch, inputs in enumerate(inner):
            for expert, tokens, rows in routed_rows(self.module, (inputs[0], inputs[1], inputs[2])):
                parts.setdefault(expert, []).append((batch, tokens, rows.float()))
        left = [gap.clone() for gap in gaps]
        axes, weight = self._architecture.tensors[self._key], self.module.down_proj
        inside = tuple(axis for axis in axes if axis != ("expert",))
        for expert, own in sorted(parts.items()):
            sums: dict[str, torch.Tensor] = {}
            for batch, tokens, rows in own:
                _add_moments(sums, rows, left[batch][tokens], weights[batch][tokens])
            # As if the others' tokens counted too: an expert must not be fitted to a few tokens alone.
            change, _ = _solve(sums, ridge * float(total / sums["n"]), intercept=False)
            matrix = input_matrix(weight[expert], inside, self._site.axis) + change.to(weight.dtype)
            weight[expert] = from_input_matrix(matrix, weight[expert], inside, self._site.axis)
            for batch, tokens, rows in own:
                left[batch][tokens] -= rows @ change.T


def output_projection(layer: nn.Module, index: int, architecture: Architecture) -> OutputProjection:
    """Find the FFN output projection of a layer of a model, or those of its experts.

    Args:
        layer: of the model.
        index: which.
        architecture: of the model.
    """
    kind = OutputProjection if architecture.family.experts is None else ExpertProjections
    return kind(layer, index, architecture)


def layer_inputs(
    model: nn.Module, layers: nn.ModuleList, batch: Mapping[str, torch.Tensor]
) -> tuple[list[torch.Tensor], list[Call]]:
    """Collect the stream into each layer, (B, T, D), and everything else that it is called with."""
    found: list[Any] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        model(**batch, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return [args[0] for args, _ in found], [(args[1:], kwargs) for args, kwargs in found]


def block_ends(
    model: nn.Module, layers: nn.ModuleList, ends: Sequence[int], batch: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Collect the stream after each of these layers, (B, T, D)."""
    found: dict[int, torch.Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[index] = tensor_of(output)

        return hook

    handles = [layers[index].register_forward_hook(keep(index)) for index in ends]
    try:
        model(**batch, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return [found[index] for index in ends]


@contextmanager
def recorded_calls(module: nn.Module) -> Iterator[list[tuple[tuple[torch.Tensor, ...], torch.Tensor]]]:
    """Record the inputs and the output of a module, call by call."""
    calls: list[tuple[tuple[torch.Tensor, ...], torch.Tensor]] = []
    handle = module.register_forward_hook(lambda module, args, output: calls.append((args, output)))
    try:
        yield calls
    finally:
        handle.remove()


def tensor_of(output: Any) -> torch.Tensor:
    """Take the hidden states out of a layer's output: a tensor, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _token_weights(target: torch.Tensor) -> torch.Tensor:
    """Weight each token by 1 / |t|, (N, 1)."""
    # What reads the stream sees it normalized, so large tokens must not be all that is fitted. But 1 / |t|^2 loses the
    # size of the few enormous ones (attention sinks), which upper blocks build on.
    return target.pow(2).mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()


def _add_moments(sums: dict[str, torch.Tensor], rows: torch.Tensor, gap: torch.Tensor, weight: torch.Tensor) -> None:
    weighted = rows * weight
    parts = {"hh": rows.T @ weighted, "gh": gap.T @ weighted, "h": weighted.sum(0), "g": (gap * weight).sum(0)}
    parts["n"] = weight.sum()
    for name, part in parts.items():
        sums[name] = sums[name] + part if name in sums else part


def _solve(sums: Mapping[str, torch.Tensor], ridge: float, intercept: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve for the change of the (outputs, inputs) matrix and of the bias (0 without an intercept), float32."""
    count = sums["n"]
    second, cross = sums["hh"] / count, sums["gh"] / count
    mean, gap = sums["h"] / count, sums["g"] / count
    if intercept:
        second, cross = second - torch.outer(mean, mean), cross - torch.outer(gap, mean)
    triangle = cholesky(second, ridge * float(second.diagonal().mean()))
    change = torch.cholesky_solve(cross.T.to(triangle), triangle).T.to(cross)
    return change, gap - change @ mean if intercept else torch.zeros_like(gap)
