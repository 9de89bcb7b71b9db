"""Models that are to be anchors of one chain: looked at, named, and checked against each other."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from cbd_trl.architectures import Architecture, architecture_of
from cbd_trl.build.compatibility import CommonForm, check_same_function, common_form, layers_beside
from cbd_trl.build.plan import anchor_name
from cbd_trl.chain.model import build_model
from cbd_trl.chain.source import Source
from cbd_trl.chain.tokenizers import ONE_TOKENIZER
from cbd_trl.surgery.weights import weights_of
from cbd_trl.utils.tokenizers import find_tokenizer, tokenizer_difference

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Member:
    """One model on its way into a chain.

    Args:
        source: where it is.
        label: what to call it in front of a reader.
        name: of its folder in the chain.
        form: what all anchors are brought to.
        architecture: what its tensors mean, in that form.
        kept: the layers of the anchor above that its own stand beside; those of the first are its own.
    """

    source: Source
    label: str
    name: str
    form: CommonForm
    architecture: Architecture
    kept: list[int]

    def load(self) -> PreTrainedModel:
        """The model in the common form, in the dtype and the coordinates it has."""
        model = self.source.model({"dtype": "auto"})
        own = architecture_of(model)
        weights = self.form.weights(weights_of(model, own), own)
        loaded = build_model(self.architecture, weights, model.dtype)
        loaded.generation_config = copy.deepcopy(model.generation_config)
        return loaded


def plan_members(sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase) -> list[Member]:
    """Everything that can be known without weights.

    Args:
        sources: largest first.
        tokenizer: the chain's.

    Raises:
        ValueError: some do not go together.
    """
    labels = [f"anchors[{i}]" + (f" ({source.name})" if source.name else "") for i, source in enumerate(sources)]
    own = {label: source.architecture() for label, source in zip(labels, sources, strict=True)}
    kinds = [architecture.config.model_type for architecture in own.values()]
    if len(set(kinds)) > 1:
        raise ValueError(
            f"The anchors are of the model types {', '.join(kinds)}. A target is one stock model, so all anchors are "
            "of one type. Distil across families with build_chain instead."
        )
    for label, source in zip(labels, sources, strict=True):
        _check_tokenizer(label, source, tokenizer)
    form = common_form(own, tokenizer)
    members: list[Member] = []
    for label, source in zip(labels, sources, strict=True):
        architecture = form.architecture(own[label])
        kept = list(range(architecture.depth))
        if members:
            above = members[-1]
            kept = layers_beside((above.label, label), above.architecture, architecture)
        if own[label].tied and not form.tied:
            logger.warning(
                f"{label} gets a head of its own, a copy of its table ({architecture.num_parameters:,} parameters "
                f"instead of {own[label].num_parameters:,}): another anchor has one, and a chain is tied or not."
            )
        name = anchor_name(architecture.num_parameters, [member.name for member in members])
        members.append(Member(source, label, name, form, architecture, kept))
    return members


def _check_tokenizer(label: str, source: Source, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse an anchor whose own tokenizer, where one is found, reads other tokens than the chain's."""
    own = find_tokenizer(source.name, source.revision, local_only=isinstance(source.place, PreTrainedModel))
    reason = None if own is None else tokenizer_difference(tokenizer, own, names=("the chain's", "its"))
    if reason is not None:
        raise ValueError(f"{label} reads other tokens than the chain's tokenizer: {reason}. {ONE_TOKENIZER}")


def check_functions(members: Sequence[Member], tokens: torch.Tensor) -> None:
    """Load each lower anchor and see whether the config of the one above does for it (see `check_same_function`).

    Args:
        members: largest first.
        tokens: (B, T) text to compare logits on.
    """
    for above, member in pairwise(members):
        weights = weights_of(member.load(), member.architecture)
        names = above.label, member.label
        check_same_function(names, above.architecture, member.architecture, weights, member.kept, tokens)
