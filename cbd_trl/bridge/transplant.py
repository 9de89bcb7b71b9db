"""A model given another tokenizer's vocabulary, without training.

Shapes: V old rows, W rows of the donor, D and E widths.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.architectures import is_tied
from cbd_trl.architectures.backbone import take_off_patches
from cbd_trl.bridge.config_ids import move_token_ids
from cbd_trl.bridge.recipes import Recipe, mean_recipe, pursuit_recipe, weighted_recipe
from cbd_trl.bridge.special_tokens import warn_of_other_marks
from cbd_trl.bridge.token_bytes import token_bytes
from cbd_trl.bridge.vocabulary import VocabularyMatch, match_vocabularies
from cbd_trl.surgery.weights import working
from cbd_trl.utils.formatting import did_you_mean

METHODS = ("mean", "weighted", "omp")
# How many tokens one is written with by "omp".
ATOMS = 64


def transplant_vocabulary(
    model: PreTrainedModel,
    old_tokenizer: PreTrainedTokenizerBase,
    new_tokenizer: PreTrainedTokenizerBase,
    method: str = "weighted",
    *,
    donor_model: PreTrainedModel | None = None,
    atoms: int = ATOMS,
    pad_to_multiple_of: int = 1,
) -> PreTrainedModel:
    """The model with the vocabulary of another tokenizer.

    Tokens that both vocabularies have keep their rows, in the input table, the head and its bias; so do special
    tokens of the same role (`match_vocabularies` tells how many). The others are built:

    - "mean": the mean of the rows of the old tokens with the same bytes, their pieces ("Fast Vocabulary Transfer",
      Gee et al., 2022).
    - "weighted": their weighted mean, moved towards the mean of all rows (see `weighted_recipe`).
    - "omp": orthogonal matching pursuit (arXiv 2506.06607): written with tokens of both vocabularies as a donor, a
      model that has the new vocabulary, would write it. Rows longer than any taken over are shortened to that, which
      the paper does not do.

    What the old tokenizer cannot read, and rows that no token has, are the mean of all old tokens.

    The model reads texts as before where they begin as before: a warning says where the new tokenizer does not add the
    special tokens that the old one adds, such as BOS (see `carry_over_special_tokens`).

    Args:
        model: a causal LM; it is not changed.
        old_tokenizer: the model's, fast.
        new_tokenizer: the one to come, fast.
        method: one of `METHODS`.
        donor_model: of the new tokenizer, of any width; for "omp" only.
        atoms: for "omp": how many tokens one is written with at most.
        pad_to_multiple_of: rows are added after the last token, up to a multiple of this.

    Returns:
        a model of the same class and dtype, tied if the old one was; begin, end and padding of its configs are those
        of the new tokenizer. It has no `name_or_path`, where the old tokenizer would be found.

    Raises:
        ValueError: an unknown method, a tokenizer that is not the model's or does not tell its bytes, nothing in
            common, a donor that is missing or not asked for, a table that is quantised or offloaded.
    """
    _check_arguments(method, donor_model, atoms, pad_to_multiple_of)
    old_ids = _check_table(model, old_tokenizer, "model", "old_tokenizer")
    match = match_vocabularies(old_tokenizer, new_tokenizer)
    warn_of_other_marks(old_tokenizer, new_tokenizer)
    if donor_model is not None:
        _check_table(donor_model, new_tokenizer, "donor_model", "new_tokenizer")
    made: Any = copy.deepcopy(model)
    take_off_patches(made)
    embedding, head = made.get_input_embeddings(), made.get_output_embeddings()
    tied = is_tied(model)
    inputs, outputs = _recipes(match, method, old_tokenizer, donor_model, atoms, tied)
    rows = -(-match.size // pad_to_multiple_of) * pad_to_multiple_of
    with torch.no_grad():
        embedding.weight = _replaced(embedding.weight, match, inputs, old_ids, rows)
        head.weight = embedding.weight if tied else _replaced(head.weight, match, outputs, old_ids, rows)
        if getattr(head, "bias", None) is not None:
            head.bias = _replaced(head.bias, match, outputs, old_ids, rows)
    move_token_ids(made, new_tokenizer, match)
    made.config.tie_word_embeddings = tied
    _resize(made, embedding, head, rows)
    made.config._name_or_path = made.name_or_path = ""
    return made


def _recipes(
    match: VocabularyMatch, method: str, old_tokenizer: Any, donor: Any, atoms: int, tied: bool
) -> tuple[Recipe, Recipe]:
    """For the input table and for the head."""
    if method == "omp":
        inputs = pursuit_recipe(match, donor.get_input_embeddings().weight.detach(), atoms)
        if tied:
            return inputs, inputs
        return inputs, pursuit_recipe(match, donor.get_output_embeddings().weight.detach(), atoms)
    if method == "mean":
        recipe = mean_recipe(match)
    else:
        recipe = weighted_recipe(match, [len(data or b"") for data in token_bytes(old_tokenizer)])
    return recipe, recipe


def _replaced(
    old: nn.Parameter, match: VocabularyMatch, recipe: Recipe, old_ids: list[int], rows: int
) -> nn.Parameter:
    """A table (V, D) or bias (V,) for the new vocabulary."""
    table = working(old.detach())
    mean = table[old_ids].mean(0)
    made = mean.repeat(rows, *[1] * (table.dim() - 1)).to(old.dtype)
    if match.built:
        built = recipe.apply(table.view(len(table), -1), mean).view(-1, *table.shape[1:])
        if table.dim() == 2:
            built = _shortened(built, table[list(match.copied.values())])
        made[list(match.built)] = built.to(old.dtype)
    # Taken from the table as it is, so that nothing is rounded.
    made[list(match.source)] = old.detach()[list(match.source.values())]
    return nn.Parameter(made, requires_grad=old.requires_grad)


def _shortened(built_ND: Tensor, taken_MD: Tensor) -> Tensor:
    longest = taken_MD.norm(dim=1).max()
    return built_ND * (longest / built_ND.norm(dim=1, keepdim=True)).clamp(max=1.0)


def _resize(model: Any, embedding: Any, head: Any, rows: int) -> None:
    """What says how long the tables are, and which row is padding."""
    embedding.num_embeddings = head.out_features = rows
    config = model.config.get_text_config()
    config.vocab_size = rows
    if embedding.padding_idx is not None:
        embedding.padding_idx = config.pad_token_id
    for module in model.modules():
        if hasattr(module, "vocab_size"):
            module.vocab_size = rows


def _check_arguments(method: str, donor_model: Any, atoms: int, pad_to_multiple_of: int) -> None:
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}: there are {', '.join(METHODS)}.{did_you_mean(method, METHODS)}")
    if (method == "omp") != (donor_model is not None):
        why = "needs a `donor_model`" if method == "omp" else "takes no `donor_model`"
        raise ValueError(
            f"method={method!r} {why}: 'omp' alone writes each new token as a model that has the new vocabulary "
            "already would write it with tokens of both. Pass such a model, of any size, with method='omp'; without "
            "one, use 'mean' or 'weighted'."
        )
    if atoms < 1 or pad_to_multiple_of < 1:
        raise ValueError(f"atoms and pad_to_multiple_of must be at least 1, got {atoms} and {pad_to_multiple_of}.")


def _check_table(model: Any, tokenizer: PreTrainedTokenizerBase, name: str, tokenizer_name: str) -> list[int]:
    """The ids of a model's tokenizer, where they are rows of the model."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{name} is a {type(model).__name__}, not a transformers model: rows of a vocabulary are moved in plain "
            "tables. Merge adapters first (`model.merge_and_unload()`), or load the path."
        )
    weight: Any = model.get_input_embeddings().weight
    if weight.is_meta or not weight.is_floating_point():
        kind = "offloaded" if weight.is_meta else f"quantised ({weight.dtype})"
        raise ValueError(f"The embeddings of {name} are {kind}: load it whole, in float32 or bfloat16.")
    ids = sorted(tokenizer.get_vocab().values())
    if ids[-1] >= len(weight):
        raise ValueError(
            f"{tokenizer_name} has ids up to {ids[-1]}, {name} only {len(weight)} rows in its table: it is not the "
            f"tokenizer of this model. Pass the one that lies beside its weights."
        )
    return ids
