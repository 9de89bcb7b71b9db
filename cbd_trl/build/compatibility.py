"""Compatibility of models trained separately as anchors of one chain: converted where exact, otherwise rejected.

A target has one config, the upper anchor's with other sizes, so everything that sizes do not change must agree.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.architectures import FREE, Architecture, architecture_of, describe
from cbd_trl.architectures.axes import axis_length, dims_of, select
from cbd_trl.chain.folders import ONE_TOKENIZER
from cbd_trl.chain.model import build_model
from cbd_trl.chain.source import Source
from cbd_trl.surgery.blocks import Block, Fits, fitting_layers, similar_blocks, spaced_layers
from cbd_trl.surgery.weights import Weights, weights_of
from cbd_trl.utils.modeling import check_at_hand
from cbd_trl.utils.tokenizers import tokenizer_difference

_WORDS = {
    "layer": "layers",
    "width": "channels",
    "ffn": "FFN neurons",
    "expert": "experts",
    "group": "key/value heads",
    "query": "query heads per key/value head",
    "conv": "channels of the convolution",
    "dim": "head size",
    "position": "number of learned positions",
}
_REASONS = {
    "dim": "The meaning of a head's coordinates depends on the head size (rotary frequencies, the scale of "
    "attention), so heads of two sizes share no coordinates.",
    "position": "A target has one table of positions.",
}
# Largest difference of logits, in units of their standard deviation, that rounding explains.
_SAME_LOGITS = 1e-5
# Rows and FFN neurons of the small models that configs are compared by, the spread of their weights, and the tokens
# that they read.
_ROWS, _NEURONS, _SPREAD, _TOKENS = 64, 24, 0.2, 48
_BEYOND_THE_TEXT = ("sliding_window", "rope_parameters")
# Positions of each row where logits are compared.
_POSITIONS = 32
# Config fields that do not change what a model computes.
_NAMES = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache", "initializer_range")


@dataclass(frozen=True)
class CommonForm:
    """The form that all anchors of a chain are converted to.

    Args:
        rows: of the vocabulary.
        tied: whether the output head is the embedding table.
    """

    rows: int
    tied: bool

    def architecture(self, architecture: Architecture) -> Architecture:
        """Convert an architecture: this number of rows, and an output head of its own where others have one."""
        config = copy.deepcopy(architecture.config)
        config.vocab_size = self.rows
        config.tie_word_embeddings = self.tied
        return describe(config)

    def weights(self, weights: Weights, architecture: Architecture) -> Weights:
        """Convert weights: cut padding rows, copy a tied table into the head. Every logit stays equal."""
        family = architecture.family
        rows = {"vocab": torch.arange(self.rows)}
        cut = {
            key: select(weights[key], axes, architecture.sizes, rows) if "vocab" in dims_of(axes) else weights[key]
            for key, axes in architecture.tensors.items()
        }
        if architecture.tied and not self.tied:
            cut[f"{family.head}.weight"] = cut[f"{family.embedding}.weight"].clone()
        return cut

    def load(self, source: Source, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
        """Load a model in this form, in its own coordinates.

        Args:
            source: the model.
            dtype: of its weights; "auto" for their own.

        Raises:
            ValueError: its weights are offloaded.
        """
        model = source.model({"dtype": dtype})
        check_at_hand(model, source.role)
        own = architecture_of(model)
        kind = model.dtype if isinstance(dtype, str) else dtype
        loaded = build_model(self.architecture(own), self.weights(weights_of(model, own), own), kind)
        loaded.generation_config = copy.deepcopy(model.generation_config)
        return loaded


def common_form(architectures: Mapping[str, Architecture], tokenizer: PreTrainedTokenizerBase) -> CommonForm:
    """Find the common form: the vocabulary rows that all anchors have; untied where any anchor is.

    Untying by a copy of the table is exact (and adds parameters); tying would change the model.

    Args:
        architectures: by name.
        tokenizer: whose tokens all need a row.

    Raises:
        ValueError: an anchor lacks the row of a token.
    """
    shortest = min(architectures, key=lambda name: architectures[name].sizes["vocab"])
    rows = architectures[shortest].sizes["vocab"]
    special = [index for one in architectures.values() for index in special_tokens(one.config)]
    needed = max([*tokenizer.get_vocab().values(), *special]) + 1
    if rows < needed:
        raise ValueError(
            f"{shortest} has {rows} vocabulary rows, but the highest id of the tokenizer and of the anchors' special "
            f"tokens is {needed - 1}: only padding rows may differ between anchors. Resize its embeddings, or pass "
            "the `processing_class` that all anchors share."
        )
    return CommonForm(rows, all(one.tied for one in architectures.values()))


def special_tokens(config: PretrainedConfig) -> list[int]:
    """Token ids in a config, such as the padding token's."""
    found: list[int] = []
    for name, value in config.to_dict().items():
        if name.endswith("_token_id"):
            found += [index for index in (value if isinstance(value, list) else [value]) if isinstance(index, int)]
    return found


def check_tokenizer(name: str, source: Source, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a model's own tokenizer, where one is found, has the chain's tokens.

    Args:
        name: of the model, in messages.
        source: the model.
        tokenizer: the chain's.

    Raises:
        ValueError: it has not.
    """
    own = source.own_tokenizer()
    reason = None if own is None else tokenizer_difference(tokenizer, own, names=("the chain's", "its"))
    if reason is not None:
        raise ValueError(f"{name} reads other tokens than the chain's tokenizer: {reason}. {ONE_TOKENIZER}")


def check_smaller(names: tuple[str, str], upper: Architecture, lower: Architecture) -> None:
    """Check that a lower anchor has fewer parameters than the one above.

    Args:
        names: of the upper and the lower one.
        upper, lower: what their tensors mean.

    Raises:
        ValueError: it has not.
    """
    if lower.num_parameters >= upper.num_parameters:
        raise ValueError(
            f"{names[1]} has {lower.num_parameters:,} parameters, no fewer than the {upper.num_parameters:,} of "
            f"{names[0]} above it. List anchors from large to small."
        )


def paired_layers(names: tuple[str, str], upper: Architecture, lower: Architecture) -> list[int]:
    """Pair the layers of two anchors in their common form.

    Args:
        names: of the upper and the lower anchor.
        upper, lower: what their tensors mean.

    Returns:
        for each lower layer the upper layer paired with it, as evenly spaced as the layer types allow.

    Raises:
        ValueError: the lower one is larger in some dimension or altogether, a size that no target can lie between
            differs, such as the head size, or its layer types do not occur in the upper one in that order.
    """
    check_smaller(names, upper, lower)
    if (reason := shape_difference(names, upper, lower)) is not None:
        raise ValueError(f"{reason} Leave one of the two out, or distill the lower one with build_chain.")
    above, below = layer_types(upper), layer_types(lower)
    even = spaced_layers(upper.depth, lower.depth)
    kept = fitting_layers(even, upper.depth, lambda layer, position: above[layer] == below[position])
    if kept is None:
        raise ValueError(_no_pairing(names, above, below))
    return kept


def shape_difference(names: tuple[str, str], upper: Architecture, lower: Architecture) -> str | None:
    """Explain which size keeps one model from lying within another; None where none does.

    Args:
        names: of the upper and the lower model.
        upper, lower: what their tensors mean.
    """
    above, below = ({**one.sizes, "layer": one.depth} for one in (upper, lower))
    free = (*FREE, "layer")
    # With heads of another size there are other numbers of them: the size is the reason.
    for dim in sorted(above, key=lambda dim: dim in free):
        what = _WORDS.get(dim, dim)
        if dim in free and below[dim] > above[dim]:
            return (
                f"{names[1]} has more {what} ({below[dim]}) than {names[0]} above it ({above[dim]}), and a lower "
                "anchor lies within the upper one in every dimension."
            )
        if dim not in free and below[dim] != above[dim]:
            why = f" {_REASONS[dim]}" if dim in _REASONS else ""
            return f"{names[0]} and {names[1]} differ in their {what}: {above[dim]} and {below[dim]}.{why}"
    return None


@torch.no_grad()
def function_difference(names: tuple[str, str], upper: Architecture, lower: Architecture) -> str | None:
    """Explain which config fields make two architectures compute differently, whatever their weights; None where
    none does.

    Small models are made under either config, with the same random weights, and their logits compared.

    Args:
        names: of the upper and the lower model.
        upper, lower: what their tensors mean; of one model type and head size.
    """
    blocks = blocks_by_type(upper, lower)
    if blocks is None:
        return (
            f"The layer types of {names[1]} do not occur in {names[0]} in that order, and every lower layer stands "
            "for upper layers of its type."
        )
    types, kept = layer_types(lower), [block.kept for block in blocks]
    one_each = sorted({types.index(kind) for kind in types})
    other = upper.with_layers([kept[place] for place in one_each]).resized(**lower.sizes)
    small = [
        _small(one)
        for one in (other.with_eps(lower.eps) if other.eps != lower.eps else other, lower.with_layers(one_each))
    ]
    # What a short text does not show: windows, and rotary embeddings that change with the length.
    beyond = [[getattr(one.config, name, None) for name in _BEYOND_THE_TEXT] for one in (upper, lower)]
    same = small[0].tensors.keys() == small[1].tensors.keys() and beyond[0] == beyond[1]
    if same:
        generator = torch.Generator().manual_seed(0)
        weights = {
            key: torch.randn([axis_length(axis, small[1].sizes) for axis in axes], generator=generator) * _SPREAD
            for key, axes in small[1].tensors.items()
        }
        tokens = torch.randint(_ROWS, (1, _TOKENS), generator=generator)
        found, expected = (build_model(one, weights, torch.float32)(input_ids=tokens).logits for one in small)
        same = bool((found - expected).abs().max() <= _SAME_LOGITS * expected.std())
    if same:
        return None
    differing = _differences(upper.config, lower.config)
    return f"Under the config of {names[0]} {names[1]} would compute something else; they differ in {differing}."


def blocks_by_type(upper: Architecture, lower: Architecture) -> list[Block] | None:
    """Pair the layers of two models by their types, as evenly spaced as these allow; None where they do not.

    Args:
        upper, lower: what their tensors mean; the lower one is no deeper.
    """
    even = torch.tensor(spaced_layers(upper.depth, lower.depth))
    nearness = -(torch.arange(upper.depth) - even[:, None]).abs().float()
    return similar_blocks(nearness, nearness, same_type(upper, lower))


def same_type(upper: Architecture, lower: Architecture) -> Fits:
    """The rule that a layer of the upper model stands beside one of its type only."""
    above, below = layer_types(upper), layer_types(lower)
    return lambda layer, position: above[layer] == below[position]


def _small(architecture: Architecture) -> Architecture:
    config = copy.deepcopy(architecture.config)
    config.vocab_size = _ROWS
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, None)
    return describe(config).resized(ffn=_NEURONS)


def layer_types(architecture: Architecture) -> list[dict[str, Any]]:
    """Each layer's entries in the per-layer lists of the config."""
    fields = architecture.family.per_layer_fields
    return [{field: architecture.entry(field, layer) for field in fields} for layer in range(architecture.depth)]


def _no_pairing(names: tuple[str, str], above: Sequence[Mapping[str, Any]], below: Sequence[Mapping[str, Any]]) -> str:
    """Format the error for anchors without a pairing: the first unpaired lower layer, why, and depths that would fit.

    Args:
        names: of the upper and the lower anchor.
        above, below: the types of their layers.
    """
    last = len(above) - 1
    # The last layers are paired, every other lower layer with the next upper layer of its type.
    left = iter(above[:-1])
    position = next((number for number, kind in enumerate(below[:-1]) if kind not in left), len(below) - 1)
    if position < len(below) - 1:
        reason = f"{names[0]} has no layer of this type left for it, in order"
    else:
        reason = f"it is paired with layer {last} of {names[0]}, which has {_described(above[last])}"
    # Cut to these depths, the upper anchor still ends with a layer of the type it ends with now.
    depths = ", ".join(str(depth) for depth in range(1, last + 1) if above[depth - 1] == above[last])
    ways = f", such as one of {depths} layers with the pattern of {names[0]}" if depths else ""
    return (
        f"Layer {position} of {names[1]} has {_described(below[position])}, but {reason}. Between two anchors every "
        f"lower layer stands for upper layers of its type. Give another anchor{ways}; or distill one from {names[0]} "
        "with build_chain."
    )


def _described(kind: Mapping[str, Any]) -> str:
    return ", ".join(f"{field} {entry}" for field, entry in kind.items() if entry is not None)


@torch.no_grad()
def check_same_function(
    names: tuple[str, str],
    upper: Architecture,
    lower: Architecture,
    weights: Weights,
    kept: Sequence[int],
    tokens: torch.Tensor,
) -> None:
    """Check that a lower anchor computes the same under the upper anchor's config, which targets get.

    Only the norms' epsilon may differ; a target takes that of the anchor its operator starts from.

    Args:
        names: of the upper and the lower anchor.
        upper, lower: what their tensors mean.
        weights: the lower anchor's.
        kept: the upper layer beside each lower one.
        tokens: (B, T) text to compare logits on.

    Raises:
        ValueError: the logits differ; the message names the fields in which the configs differ.
    """
    other = upper.with_layers(kept).resized(**lower.sizes)
    if other.eps != lower.eps:
        other = other.with_eps(lower.eps)
    same = same_tensors = other.tensors.keys() == lower.tensors.keys()
    if same:
        # At a few positions only: with a large vocabulary all logits would take gigabytes.
        length = tokens.shape[1]
        places = torch.linspace(0, length - 1, min(length, _POSITIONS)).long()
        expected, found = (
            build_model(one, weights, torch.float32)(input_ids=tokens, use_cache=False, logits_to_keep=places).logits
            for one in (lower, other)
        )
        same = bool((found - expected).abs().max() <= _SAME_LOGITS * expected.std())
    if not same:
        raise ValueError(
            f"{names[0]} and {names[1]} are not compatible: under the first one's config, with its own sizes, the "
            f"second has other {'logits' if same_tensors else 'tensors'}. The configs differ in "
            f"{_differences(other.config, lower.config)}, and a target has one. Leave one of the two out, or distill "
            "the lower one with build_chain."
        )


def _differences(upper: PretrainedConfig, lower: PretrainedConfig) -> dict[str, tuple[Any, Any]]:
    ours, theirs = upper.to_dict(), lower.to_dict()
    return {
        name: (ours.get(name), theirs.get(name))
        for name in sorted(ours.keys() | theirs.keys())
        if name not in _NAMES and ours.get(name) != theirs.get(name)
    }
