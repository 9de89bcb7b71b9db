"""Naive twins of the mixing operators: plain loops over tensors, root mean squares taken from the streams."""

from typing import Any

import torch
from transformers import PreTrainedModel

from cbd_trl.architectures import Architecture
from cbd_trl.architectures.axes import tensor_shape
from cbd_trl.surgery.least_squares import least_squares_cut
from cbd_trl.surgery.norms import fold_norms
from cbd_trl.surgery.weights import Weights
from cbd_trl.targets.operators import Pair
from tests.surgery.helpers import keeps_bias, tokens

# Which upper layer stands at each place of a target, and which lower layer is mixed in (None: a swapped block).
_NESTED_LAYERS = {"width": [(i, i) for i in range(6)], "both": [(0, 0), (2, 1), (3, None), (4, None), (5, None)]}
_HEAD_READERS = ("o_proj.", "attn.c_proj.", ".dense.", "self_attn.out_proj.")
_LINEAR_LAYERS = {
    "depth": ([0, 1, 2, 4, 5], [0, 1, 2, 2, 3]),
    "width": (list(range(6)), list(range(6))),
    "both": ([0, 1, 2, 4, 5], [0, 1, 2, 2, 3]),
}


def _kind(pair: Pair) -> str:
    if pair.equal_widths:
        return "depth"
    return "width" if pair.upper_architecture.depth == pair.lower_architecture.depth else "both"


def _split(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A prefix of every axis is then what two anchors share: GPT-2's q, k and v get an axis of their own.

    (GPT-NeoX keeps q, k and v of a head together, so fewer heads are a prefix there.) LFM2's convolution likewise has
    three parts, in its rows.
    """
    if ".conv.in_proj." in key:
        return tensor.reshape(3, -1, *tensor.shape[1:])
    return tensor.reshape(*tensor.shape[:-1], 3, -1) if ".c_attn." in key else tensor


def _region(small: torch.Tensor) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in small.shape)


def _input_axis(key: str, target: Architecture) -> int | None:
    """Which axis of the split tensor is read along: PyTorch's linear layers the last, GPT-2's Conv1D the first."""
    outside = target.split_name(key)[0] is None
    if ".experts." in key:
        # Of each expert a matrix, which gpt-oss stores as Conv1D does.
        return None if key.endswith("bias") else 1 if target.config.model_type == "gpt_oss" else 2
    if outside and target.tied and ("norm." in key or "ln_f." in key):
        return 0
    if len(target.tensors[key]) == 1 or (outside and key != "lm_head.weight"):
        return None
    if ".conv.in_proj." in key:
        return 2
    return 0 if target.config.model_type == "gpt2" and key != "lm_head.weight" else 1


def _at(architecture: Architecture, key: str, layer: int) -> str:
    """The same tensor in another layer."""
    return architecture.layer_name(layer, architecture.split_name(key)[1])


def _nearest(architecture: Architecture, layer: int, kind: str | None) -> int:
    """The nearest layer of a kind, where there are several."""
    others = [i for i in range(architecture.depth) if kind in (None, architecture.kind(i))]
    return min(others, key=lambda other: abs(other - layer))


@torch.no_grad()
def _root_mean_squares(model: PreTrainedModel, narrow: Architecture) -> dict[str, float]:
    """Of the first coordinates, as many as each norm of `narrow` has, over that of all, for what the norms of a model
    of its depth or more put out before gain and bias."""
    ratios: dict[str, float] = {}
    handles = []
    for name, norm in model.named_modules():
        if not name.endswith(("norm", "ln_1", "ln_2", "ln_f")):
            continue
        layer, inside = narrow.split_name(f"{name}.weight")
        places = [f"{name}.weight"] if layer is None else [narrow.layer_name(i, inside) for i in range(narrow.depth)]
        key = next((place for place in places if place in narrow.tensors), None)
        if key is None or key.rsplit(".", 1)[0] not in narrow.norms:
            continue
        width = tensor_shape(narrow.tensors[key], narrow.sizes)[0]

        # The last call counts: nanochat's final norm normalizes the embeddings first.
        def measure(norm: Any, _: Any, output: torch.Tensor, name: str = name, width: int = width) -> None:
            gain = narrow.family.gain_offset + norm.weight if hasattr(norm, "weight") else torch.ones(())
            stream = (output - getattr(norm, "bias", torch.zeros(()))) / gain
            kept = stream[..., :width]
            if narrow.family.norm_type == "layer":
                kept = kept - kept.mean(-1, keepdim=True)
            ratios[name] = float((kept.pow(2).mean() / stream.pow(2).mean()).sqrt())

        handles.append(norm.register_forward_hook(measure))
    model(tokens(16, seed=1))
    for handle in handles:
        handle.remove()
    return ratios


def _rescaled_lower(pair: Pair, target: Architecture, upper_model: PreTrainedModel) -> Weights:
    """The lower anchor as a norm over the target's width has to see it.

    A norm of the target over d channels makes the shared ones r(lower) / r(d) times as large as the lower anchor's
    norm did, r(n) being the root mean square of the first n channels; the target's gain of r(d) in all folded norms
    leaves 1 / r(lower) for the readers.
    """
    architecture = pair.lower_architecture
    folded = fold_norms(pair.lower, architecture)
    at_lower = _root_mean_squares(upper_model, architecture)
    at_target = _root_mean_squares(upper_model, target)
    rescaled = dict(folded)

    def name_above(norm: str) -> str:
        layer, name = architecture.split_name(norm)
        return norm if layer is None else pair.upper_architecture.layer_name(pair.kept[layer], name)

    # What no linear layer reads keeps its gain, like the final norm of a tied head.
    for norm in architecture.output_norms:
        above = name_above(norm.name)
        rescaled[f"{norm.name}.weight"] = folded[f"{norm.name}.weight"] * at_target[above] / at_lower[above]
    if architecture.family.bare_norms:
        # What layers add is to be as large, beside the embeddings, as it was.
        first = pair.upper_architecture.sites[0].name
        for key in folded:
            if ".o_proj." in key or ".fc2." in key:
                rescaled[key] = folded[key] * at_lower[first] / at_target[first]
    for site in architecture.sites:
        if not site.norm:
            continue
        above = name_above(site.name)
        layer = architecture.split_name(site.name)[0]
        keeps_gain = (layer is None and architecture.tied) or keeps_bias(site, architecture)
        if keeps_gain:
            rescaled[f"{site.name}.weight"] = folded[f"{site.name}.weight"] * at_target[above] / at_lower[above]
            continue
        rescaled[f"{site.name}.weight"] = folded[f"{site.name}.weight"] * at_target[above]
        for reader in site.readers:
            rescaled[f"{reader}.weight"] = folded[f"{reader}.weight"] / at_lower[above]
    return rescaled


def nested_twin(pair: Pair, target: Architecture, alpha: float, upper_model: PreTrainedModel) -> Weights:
    """New outputs from the cut; shared ones alpha * lower + (1 - alpha) * cut, the lower one reading nothing new;
    alpha cubed for what reads the heads."""
    upper = fold_norms(pair.upper, pair.upper_architecture)
    narrow = pair.upper_architecture.resized(**target.sizes)
    cut = least_squares_cut(upper, pair.upper_architecture, pair.statistics, narrow)
    lower = _rescaled_lower(pair, target, upper_model)
    twin = {}
    for key in target.tensors:
        layer = target.split_name(key)[0]
        above, below = (None, 0) if layer is None else _NESTED_LAYERS[_kind(pair)][layer]
        array = _split(key, cut[key if above is None else _at(target, key, above)]).clone()
        if below is not None:
            small = _split(key, lower[key if layer is None else _at(target, key, below)])
            padded, region = torch.zeros_like(array), list(_region(small))
            padded[tuple(region)] = small
            if (axis := _input_axis(key, target)) is not None:
                region[axis] = slice(None)
            outputs = tuple(region)
            share = alpha**3 if any(part in key for part in _HEAD_READERS) else alpha
            array[outputs] = share * padded[outputs] + (1 - share) * array[outputs]
        twin[key] = array.reshape(tensor_shape(target.tensors[key], target.sizes))
    return twin


def linear_twin(pair: Pair, target: Architecture, alpha: float) -> Weights:
    """alpha * zero-padded small + (1 - alpha) * plainly cut large, layers at equal relative depth."""
    large_layers, small_layers = _LINEAR_LAYERS[_kind(pair)]
    twin = {}
    for key, axes in target.tensors.items():
        layer = target.split_name(key)[0]
        names = [key, key]
        if layer is not None:
            kind, sides = target.kind(layer), (pair.upper_architecture, pair.lower_architecture)
            wanted = (large_layers[layer], small_layers[layer])
            names = [_at(target, key, _nearest(*each, kind)) for each in zip(sides, wanted, strict=True)]
        large, small = pair.upper[names[0]], pair.lower[names[1]]
        empty = _split(key, torch.zeros(tensor_shape(axes, target.sizes), dtype=torch.float64))
        padded, cut = empty.clone(), _split(key, large)[_region(empty)]
        padded[_region(_split(key, small))] = _split(key, small)
        twin[key] = (alpha * padded + (1 - alpha) * cut).reshape(tensor_shape(axes, target.sizes))
    return twin
