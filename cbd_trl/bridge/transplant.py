"""A model given another tokenizer's vocabulary, without training.

Shapes: V old rows, W rows of the donor, D and E widths.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.architectures import is_tied
from cbd_trl.architectures.backbone import take_off_patches
from cbd_trl.bridge.special_tokens import warn_of_other_special_tokens
from cbd_trl.bridge.token_bytes import token_bytes
from cbd_trl.bridge.vocabulary import VocabularyMatch, match_vocabularies, move_token_ids
from cbd_trl.surgery.weights import working
from cbd_trl.utils.formatting import did_you_mean
from cbd_trl.utils.progress import Progress

# Targets at a time: their correlations with every atom are held at once.
_BATCH = 256
# A new atom that is this much of itself outside the span of the earlier ones, or less, says nothing new.
_DEPENDENT = 1e-4


def matching_pursuit(target_ND: Tensor, atom_AD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The atoms that each target is written with, and how much of each.

    Atom by atom, the one whose direction the rest of the target has most of (Pati et al., 1993); the coefficients are
    those of the least squares on all that were chosen. The code of arXiv 2506.06607 goes by the inner product with the
    atom as it is, which prefers long atoms whatever their direction.

    Args:
        target_ND: (N, D), floating point.
        atom_AD: (A, D), same dtype.
        count: K; no more than A and D are used.

    Returns:
        which atoms, (N, K) int64, and their coefficients, (N, K): `(coefficient[:, :, None] * atom[chosen]).sum(1)` is
        the fit. A coefficient is 0 where fewer atoms say all.
    """
    count = min(count, *atom_AD.shape)
    direction = torch.nn.functional.normalize(atom_AD, dim=1)
    parts = [
        _pursue(part, atom_AD, direction, count) for part in Progress("Rebuilding embeddings", target_ND.split(_BATCH))
    ]
    return torch.cat([chosen for chosen, _ in parts]), torch.cat([coefficient for _, coefficient in parts])


def _pursue(target_ND: Tensor, atom_AD: Tensor, direction_AD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    rows = len(target_ND)
    each = torch.arange(rows, device=target_ND.device)
    chosen = torch.zeros(rows, count, dtype=torch.int64, device=target_ND.device)
    basis = target_ND.new_zeros(rows, count, target_ND.shape[1])
    # The chosen atoms in that basis, column by column: atom = basis^T factor.
    factor = torch.eye(count, dtype=target_ND.dtype, device=target_ND.device).repeat(rows, 1, 1)
    along = target_ND.new_zeros(rows, count)
    taken = torch.zeros(rows, len(atom_AD), dtype=torch.bool, device=target_ND.device)
    rest = target_ND.clone()
    for step in range(count):
        likeness = (rest @ direction_AD.T).abs().masked_fill_(taken, -1.0)
        best = likeness.argmax(1)
        chosen[:, step], taken[each, best] = best, True
        atom = atom_AD[best]
        earlier = basis[:, :step]
        # Twice: one pass leaves rounding errors that add up over the steps.
        new = atom
        for _ in range(2):
            new = new - torch.einsum("nk,nkd->nd", torch.einsum("nkd,nd->nk", earlier, new), earlier)
        length = new.norm(dim=1)
        useful = length > _DEPENDENT * atom.norm(dim=1)
        basis[:, step] = torch.where(useful, 1 / length, 0.0)[:, None] * new
        factor[:, :step, step] = torch.einsum("nkd,nd->nk", earlier, atom)
        factor[:, step, step] = torch.where(useful, length, 1.0)
        along[:, step] = torch.einsum("nd,nd->n", basis[:, step], rest)
        rest = rest - along[:, step, None] * basis[:, step]
    return chosen, torch.linalg.solve_triangular(factor, along[:, :, None], upper=True)[:, :, 0]


# What "weighted" takes: how much less a piece counts than the next one, and the share of the mean of all rows.
_POSITION_DECAY = 0.75
_MEAN_SHARE = 0.2


@dataclass(frozen=True)
class RowCombination:
    """Rows that are sums of old rows. N rows are made, of P parts together.

    Args:
        part: old ids, row after row, (P,) int64.
        start: where each row's parts begin, (N,) int64.
        share: what each part is multiplied by, (P,) floating point.
        neutral: what the mean of all old rows is multiplied by.
    """

    part: Tensor
    start: Tensor
    share: Tensor
    neutral: float = 0.0

    def apply(self, table_VD: Tensor, mean_D: Tensor) -> Tensor:
        """The rows, (N, D), from an old table (V, D), in its dtype, and the mean of its rows (D,)."""
        place, dtype = table_VD.device, table_VD.dtype
        part, start, share = self.part.to(place), self.start.to(place), self.share.to(place, dtype)
        sums = torch.nn.functional.embedding_bag(part, table_VD, start, mode="sum", per_sample_weights=share)
        return sums + self.neutral * mean_D


def mean_rows(match: VocabularyMatch) -> RowCombination:
    """Each built row is the mean of its pieces' rows."""
    return _averages(match, [[1.0] * len(pieces) for pieces in match.built.values()], neutral=0.0)


def weighted_rows(match: VocabularyMatch, lengths: Sequence[int]) -> RowCombination:
    """Each built row is a weighted mean of its pieces' rows, moved a part of the way to the mean of all old rows.

    A piece counts by its bytes, and more the later it is: the model goes on reading from the last one. And a token of
    several pieces is rarer than each of them, but the mean of their rows in the head would make it as likely.
    Measured without training on SmolLM2-135M, tied, given BPEs of its own kind, bits per byte of held-out text: with
    16000, 8000 and 4000 tokens 1.607, 1.701 and 1.902, where "mean" has 1.730, 1.791 and 1.974. The three parts apart
    (8000 tokens, other text): mean 1.716, by bytes 1.710, by place too 1.701, moved too 1.629. To lengthen the mean to
    the length of its pieces, as one might, is far worse.

    Args:
        match: which tokens are built of which pieces.
        lengths: bytes of each old token, by id.
    """
    weights = [
        [lengths[piece] * _POSITION_DECAY ** (len(pieces) - place) for place, piece in enumerate(pieces, start=1)]
        for pieces in match.built.values()
    ]
    return _averages(match, weights, neutral=_MEAN_SHARE)


def _averages(match: VocabularyMatch, weights: list[list[float]], neutral: float) -> RowCombination:
    lengths = torch.tensor([len(pieces) for pieces in match.built.values()], dtype=torch.int64)
    part = torch.tensor([piece for pieces in match.built.values() for piece in pieces], dtype=torch.int64)
    share = [(1 - neutral) * weight / sum(row) for row in weights for weight in row]
    return RowCombination(part, lengths.cumsum(0) - lengths, torch.tensor(share, dtype=torch.float64), neutral)


def pursuit_rows(match: VocabularyMatch, donor_WE: Tensor, atoms: int) -> RowCombination:
    """Each built row is the sum of taken-over rows that the donor's row is (arXiv 2506.06607).

    A token's row in the donor's table is written with the donor's rows of tokens that both vocabularies have; the
    same coefficients then hold for the model's rows of these tokens.

    Args:
        match: which tokens are built, and which both vocabularies have.
        donor_WE: a table of a model that has the new vocabulary, (W, E).
        atoms: how many tokens one is written with; no more than the donor's width and the tokens in common.
    """
    donor = working(donor_WE)
    new = torch.tensor(list(match.copied), device=donor.device)
    old = torch.tensor(list(match.copied.values()), device=donor.device)
    built = torch.tensor(list(match.built), dtype=torch.int64, device=donor.device)
    chosen, coefficient = matching_pursuit(donor[built], donor[new], atoms)
    start = torch.arange(len(built)) * chosen.shape[1]
    return RowCombination(old[chosen].flatten(), start, coefficient.flatten())


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
    - "weighted": their weighted mean, moved towards the mean of all rows (see `weighted_rows`).
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
            common, a donor that is missing or not asked for, a table that is quantized or offloaded.
    """
    _check_arguments(method, donor_model, atoms, pad_to_multiple_of)
    old_ids = _check_table(model, old_tokenizer, "model", "old_tokenizer")
    match = match_vocabularies(old_tokenizer, new_tokenizer)
    warn_of_other_special_tokens(old_tokenizer, new_tokenizer)
    if donor_model is not None:
        _check_table(donor_model, new_tokenizer, "donor_model", "new_tokenizer")
    made: Any = copy.deepcopy(model)
    take_off_patches(made)
    embedding, head = made.get_input_embeddings(), made.get_output_embeddings()
    tied = is_tied(model)
    inputs, outputs = _row_combinations(match, method, old_tokenizer, donor_model, atoms, tied)
    rows = -(-match.size // pad_to_multiple_of) * pad_to_multiple_of
    with torch.no_grad():
        embedding.weight = _new_table(embedding.weight, match, inputs, old_ids, rows)
        head.weight = embedding.weight if tied else _new_table(head.weight, match, outputs, old_ids, rows)
        if getattr(head, "bias", None) is not None:
            head.bias = _new_table(head.bias, match, outputs, old_ids, rows)
    move_token_ids(made, new_tokenizer, match)
    made.config.tie_word_embeddings = tied
    _resize(made, embedding, head, rows)
    made.config._name_or_path = made.name_or_path = ""
    return made


def _row_combinations(
    match: VocabularyMatch, method: str, old_tokenizer: Any, donor: Any, atoms: int, tied: bool
) -> tuple[RowCombination, RowCombination]:
    """For the input table and for the head."""
    if method == "omp":
        inputs = pursuit_rows(match, donor.get_input_embeddings().weight.detach(), atoms)
        if tied:
            return inputs, inputs
        return inputs, pursuit_rows(match, donor.get_output_embeddings().weight.detach(), atoms)
    if method == "mean":
        recipe = mean_rows(match)
    else:
        recipe = weighted_rows(match, [len(data or b"") for data in token_bytes(old_tokenizer)])
    return recipe, recipe


def _new_table(
    old: nn.Parameter, match: VocabularyMatch, recipe: RowCombination, old_ids: list[int], rows: int
) -> nn.Parameter:
    """A table (V, D) or bias (V,) for the new vocabulary."""
    table = working(old.detach())
    mean = table[old_ids].mean(0)
    made = mean.repeat(rows, *[1] * (table.dim() - 1)).to(old.dtype)
    if match.built:
        built = recipe.apply(table.view(len(table), -1), mean).view(-1, *table.shape[1:])
        if table.dim() == 2:
            built = _clip_norms(built, table[list(match.copied.values())])
        made[list(match.built)] = built.to(old.dtype)
    # Taken from the table as it is, so that nothing is rounded.
    made[list(match.source)] = old.detach()[list(match.source.values())]
    return nn.Parameter(made, requires_grad=old.requires_grad)


def _clip_norms(built_ND: Tensor, taken_MD: Tensor) -> Tensor:
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
        kind = "offloaded" if weight.is_meta else f"quantized ({weight.dtype})"
        raise ValueError(f"The embeddings of {name} are {kind}: load it whole, in float32 or bfloat16.")
    ids = sorted(tokenizer.get_vocab().values())
    if ids[-1] >= len(weight):
        raise ValueError(
            f"{tokenizer_name} has ids up to {ids[-1]}, {name} only {len(weight)} rows in its table: it is not the "
            f"tokenizer of this model. Pass the one that lies beside its weights."
        )
    return ids
