"""Refitting a cut model to the stream of the whole one: a start for distillation far ahead of the cut itself."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from cbd_trl.architectures import Architecture, decoder_layers
from cbd_trl.surgery.weights import from_input_matrix, input_matrix

# Best of 1e-2, 0.1, 0.4 and 1.5 on 6k tokens of SmolLM2-135M (30 -> 16 layers, and 576 -> 384 channels).
RIDGE = 0.1


class _Stopped(Exception):
    """The first layer's inputs are known; nothing after it is needed."""


@torch.no_grad()
def refit_layers(
    student: nn.Module,
    teacher: nn.Module,
    architecture: Architecture,
    blocks: Sequence[Sequence[int]],
    batches: Iterable[Mapping[str, torch.Tensor]],
    ridge: float = RIDGE,
    progress: bool = False,
) -> None:
    """Change each student layer's FFN output projection so that the layer ends where the teacher's block ends.

    Layer by layer from the first: with h the input of the output projection W, s the layer's output in the student
    (whose layers below are refitted already) and t the teacher's stream at the end of the block on the channels they
    share, W moves by E[(t - s) h^T] (E[h h^T] + ridge)^-1 and its bias, where it has one, by the mean that is left.
    Tokens are weighted by 1 / |t|.

    Args:
        student: a model cut from the teacher, in depth, width or both; changed in place.
        teacher: the model it was cut from.
        architecture: the student's.
        blocks: for each student layer the teacher layers it stands for.
        batches: model inputs of calibration text, without padding.
        ridge: times the mean diagonal of E[h h^T].
        progress: show a progress bar.

    Raises:
        ValueError: there are no batches.
    """
    site = next(site for site in architecture.family.sites if site.axis == ("ffn",))
    ours, theirs = decoder_layers(student), decoder_layers(teacher)
    streams, calls, targets = [], [], []
    for batch in batches:
        stream, call = _first_layer_inputs(student, ours[0], batch)
        streams.append(stream)
        calls.append(call)
        width = stream.shape[-1]
        ends = _block_ends(teacher, theirs, [block[-1] for block in blocks], batch)
        targets.append([end[..., :width] for end in ends])
    if not streams:
        raise ValueError("There is no calibration text to refit the layers on. Give at least one batch.")
    for i, layer in enumerate(tqdm(ours, desc="Refitting layers", disable=not progress, leave=False)):
        module = layer.get_submodule(site.readers[0])
        sums: dict[str, torch.Tensor] = {}
        inner, outputs = [], []
        for number, stream in enumerate(streams):
            with _recorded_input(module) as recorded:
                output = _tensor(layer(stream, *calls[number][0], **calls[number][1]))
            inner.append(recorded[0].flatten(0, -2).float())
            outputs.append(output)
            _add_moments(sums, inner[-1], output.flatten(0, -2).float(), targets[number][i].flatten(0, -2).float())
        change, shift = _solve(sums, ridge, intercept=module.bias is not None)
        key = architecture.layer_name(i, f"{site.readers[0]}.weight")
        axes = architecture.tensors[key]
        matrix = input_matrix(module.weight, axes, site.axis)
        module.weight.copy_(from_input_matrix(matrix + change.to(matrix.dtype), module.weight, axes, site.axis))
        if module.bias is not None:
            module.bias.add_(shift.to(module.bias.dtype))
        streams = [
            output + (rows @ change.T + shift).view_as(output).to(output.dtype)
            for output, rows in zip(outputs, inner, strict=True)
        ]


def _add_moments(
    sums: dict[str, torch.Tensor], rows: torch.Tensor, stream: torch.Tensor, target: torch.Tensor
) -> None:
    gap = target - stream
    # What reads the stream sees it normalised, so large tokens must not be all that is fitted. But 1 / |t|^2
    # loses the size of the few enormous ones (attention sinks), which upper blocks build on.
    weight = target.pow(2).mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
    weighted = rows * weight
    parts = {"hh": rows.T @ weighted, "gh": gap.T @ weighted, "h": weighted.sum(0), "g": (gap * weight).sum(0)}
    parts["n"] = weight.sum()
    for name, part in parts.items():
        sums[name] = sums[name] + part if name in sums else part


def _solve(sums: Mapping[str, torch.Tensor], ridge: float, intercept: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Change of the (outputs, inputs) matrix and of the bias (0 without an intercept), float32."""
    count = sums["n"].double()
    second, cross = sums["hh"].double() / count, sums["gh"].double() / count
    mean, gap = sums["h"].double() / count, sums["g"].double() / count
    if intercept:
        second, cross = second - torch.outer(mean, mean), cross - torch.outer(gap, mean)
    second.diagonal().add_(ridge * second.diagonal().mean())
    change = torch.linalg.solve(second, cross.T).T
    shift = gap - change @ mean if intercept else torch.zeros_like(gap)
    return change.float(), shift.float()


def _tensor(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


class _recorded_input:
    """Within it, the inputs a module is called with."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __enter__(self) -> list[torch.Tensor]:
        inputs: list[torch.Tensor] = []
        self._handle = self._module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        return inputs

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()


def _first_layer_inputs(
    model: nn.Module, layer: nn.Module, batch: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The stream at the first layer and everything else that every layer is called with (masks, positions)."""
    found: list[Any] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Stopped

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**batch, use_cache=False)
    except _Stopped:
        pass
    finally:
        handle.remove()
    (stream, *rest), kwargs = found[0]
    return stream, (tuple(rest), kwargs)


def _block_ends(
    model: nn.Module, layers: nn.ModuleList, ends: Sequence[int], batch: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """The stream after each of these layers."""
    found: dict[int, torch.Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[index] = _tensor(output)

        return hook

    handles = [layers[index].register_forward_hook(keep(index)) for index in ends]
    try:
        model(**batch, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return [found[index] for index in ends]
