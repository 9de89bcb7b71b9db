"""Give a model another tokenizer's vocabulary, without training.

`transplant_vocabulary` keeps the rows of tokens that both vocabularies have and builds the others as sums of old rows
(`RowCombination`), by one of three methods: `mean_rows`, `weighted_rows` or `pursuit_rows`.

Shapes: V old rows, W rows of the donor, N rows that are built, of P parts together; D and E widths of model and donor.
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

METHODS = ("mean", "weighted", "omp")
# How many tokens one is written with by "omp".
ATOMS = 64

# Of "weighted": how much less a piece counts than the next one, and the share of the mean of all rows.
_POSITION_DECAY = 0.75
_MEAN_SHARE = 0.2
# Targets at a time: their correlations with every atom are held at once.
_BATCH = 256
# An atom of which this share or less lies outside the span of the earlier ones counts as dependent on them.
_DEPENDENT = 1e-4


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
    """Give a copy of a model the vocabulary of another tokenizer.

    Tokens that both vocabularies have keep their rows, in the input table, the head and its bias; so do special
    tokens of the same role (`match_vocabularies` lists them). The others are built:

    - "mean": the mean of the rows of the old tokens with the same bytes, their pieces ("Fast Vocabulary Transfer",
      Gee et al., 2022).
    - "weighted": their weighted mean, moved towards the mean of all rows (see `weighted_rows`).
    - "omp": orthogonal matching pursuit (arXiv 2506.06607): a donor, a model that has the new vocabulary, writes the
      row as a sum of rows of tokens in both vocabularies; the same sum is taken of the model's rows. Deviation: rows
      longer than any kept row are scaled down to that length.

    Tokens that the old tokenizer cannot read, and rows without a token, get the mean of all old tokens.

    A warning is logged if the new tokenizer does not add the special tokens that the old one adds, such as BOS: the
    model was trained on texts that begin with them (see `carry_over_special_tokens`).

    Args:
        model: a causal LM; it is not changed.
        old_tokenizer: the model's own, a fast one.
        new_tokenizer: the one to give it, a fast one.
        method: one of `METHODS`.
        donor_model: a model of the new tokenizer, of any width; for "omp" only.
        atoms: for "omp": the most rows that one is a sum of.
        pad_to_multiple_of: rows are added after the last token, up to a multiple of this.

    Returns:
        a model of the same class and dtype, tied if the old one was; begin, end and padding of its configs are those
        of the new tokenizer. It has no `name_or_path`, where the old tokenizer would be found.

    Raises:
        ValueError: an unknown method, a tokenizer that is not the model's or has no exact bytes, nothing in common, a
            missing or superfluous donor, a table that is quantized or offloaded.
        TypeError: `model` or `donor_model` is not a transformers model.
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


@dataclass(frozen=True)
class RowCombination:
    """N rows as weighted sums of old rows.

    Args:
        ids_P: old ids of the parts, row after row, int64.
        starts_N: the first part of each row, int64.
        weights_P: what each part is multiplied by, floating point.
        mean_weight: what the mean of all old rows is multiplied by.
    """

    ids_P: Tensor
    starts_N: Tensor
    weights_P: Tensor
    mean_weight: float = 0.0

    def apply(self, table_VD: Tensor, mean_D: Tensor) -> Tensor:
        """Compute the rows, (N, D), in the dtype of the old table (V, D); `mean_D` is the mean of its rows."""
        device = table_VD.device
        ids_P, starts_N = self.ids_P.to(device), self.starts_N.to(device)
        weights_P = self.weights_P.to(device, table_VD.dtype)
        sums_ND = torch.nn.functional.embedding_bag(
            ids_P, table_VD, starts_N, mode="sum", per_sample_weights=weights_P
        )
        return sums_ND + self.mean_weight * mean_D


def mean_rows(match: VocabularyMatch) -> RowCombination:
    """Make each built row the mean of its pieces' rows ("Fast Vocabulary Transfer", Gee et al., 2022)."""
    return _averages(match, [[1.0] * len(pieces) for pieces in match.built.values()], mean_weight=0.0)


def weighted_rows(match: VocabularyMatch, lengths: Sequence[int]) -> RowCombination:
    """Make each built row a weighted mean of its pieces' rows, moved towards the mean of all old rows.

    A piece is weighted by its bytes, and more the later it comes: the model continues from the last one. The move
    towards the mean is there because a token of several pieces is rarer than each of them, and the mean of their rows
    in the head would make it as likely. Measured without training on SmolLM2-135M (tied; smaller BPEs of its kind), in
    bits per byte of held-out text: with 16000, 8000 and 4000 tokens 1.607, 1.701 and 1.902, where "mean" has 1.730,
    1.791 and 1.974. Step by step (8000 tokens, other text): mean 1.716, weighted by bytes 1.710, by position too
    1.701, moved too 1.629. Lengthening the mean to the length of its pieces is far worse.

    Args:
        match: of the two vocabularies.
        lengths: bytes of each old token, by id.
    """
    weights = [
        [lengths[piece] * _POSITION_DECAY ** (len(pieces) - i) for i, piece in enumerate(pieces, start=1)]
        for pieces in match.built.values()
    ]
    return _averages(match, weights, mean_weight=_MEAN_SHARE)


def pursuit_rows(match: VocabularyMatch, donor_WE: Tensor, atoms: int) -> RowCombination:
    """Make each built row the sum of kept rows that it is in a donor (arXiv 2506.06607).

    Matching pursuit writes the token's row in the donor's table as a sum of the donor's rows of tokens that both
    vocabularies have; the same coefficients are used for the model's rows of these tokens.

    Args:
        match: of the two vocabularies.
        donor_WE: a table of a model that has the new vocabulary, (W, E).
        atoms: rows that one is a sum of; no more than the donor's width and the tokens in common.
    """
    donor = working(donor_WE)
    new = torch.tensor(list(match.copied), device=donor.device)
    old = torch.tensor(list(match.copied.values()), device=donor.device)
    built = torch.tensor(list(match.built), dtype=torch.int64, device=donor.device)
    chosen, coefficient = matching_pursuit(donor[built], donor[new], atoms)
    start = torch.arange(len(built)) * chosen.shape[1]
    return RowCombination(old[chosen].flatten(), start, coefficient.flatten())


def matching_pursuit(target_ND: Tensor, atom_AD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Write each target as a sum of a few atoms, by orthogonal matching pursuit (Pati et al., 1993).

    Each step adds the atom whose direction has the largest inner product with the residual of the target; the
    coefficients are the least squares on all chosen atoms. Deviation: the code of arXiv 2506.06607 takes the inner
    product with the atom as it is, which prefers long atoms whatever their direction.

    Args:
        target_ND: (N, D), floating point.
        atom_AD: (A, D), same dtype.
        count: K, the number of atoms; at most A and D are used.

    Returns:
        the chosen atoms, (N, K) int64, and their coefficients, (N, K); the fit is
        `(coefficient[:, :, None] * atom[chosen]).sum(1)`. A coefficient is 0 where fewer atoms are enough.
    """
    count = min(count, *atom_AD.shape)
    direction = torch.nn.functional.normalize(atom_AD, dim=1)
    parts = [
        _pursue(part, atom_AD, direction, count) for part in Progress("Rebuilding embeddings", target_ND.split(_BATCH))
    ]
    return torch.cat([chosen for chosen, _ in parts]), torch.cat([coefficient for _, coefficient in parts])


def _row_combinations(
    match: VocabularyMatch, method: str, old_tokenizer: Any, donor: Any, atoms: int, tied: bool
) -> tuple[RowCombination, RowCombination]:
    """Combine rows for the input table and for the head."""
    if method == "omp":
        inputs = pursuit_rows(match, donor.get_input_embeddings().weight.detach(), atoms)
        if tied:
            return inputs, inputs
        return inputs, pursuit_rows(match, donor.get_output_embeddings().weight.detach(), atoms)
    if method == "mean":
        combination = mean_rows(match)
    else:
        combination = weighted_rows(match, [len(data or b"") for data in token_bytes(old_tokenizer)])
    return combination, combination


def _new_table(
    old: nn.Parameter, match: VocabularyMatch, combination: RowCombination, old_ids: list[int], rows: int
) -> nn.Parameter:
    """Make a table (rows, D) or bias (rows,) for the new vocabulary from the old one."""
    table = working(old.detach())
    mean = table[old_ids].mean(0)
    made = mean.repeat(rows, *[1] * (table.dim() - 1)).to(old.dtype)
    if match.built:
        built = combination.apply(table.view(len(table), -1), mean).view(-1, *table.shape[1:])
        if table.dim() == 2:
            built = _clip_norms(built, table[list(match.copied.values())])
        made[list(match.built)] = built.to(old.dtype)
    # Copied from the table as it is, so that nothing is rounded.
    made[list(match.source)] = old.detach()[list(match.source.values())]
    return nn.Parameter(made, requires_grad=old.requires_grad)


def _clip_norms(built_ND: Tensor, kept_MD: Tensor) -> Tensor:
    """Scale rows down that are longer than all kept ones."""
    longest = kept_MD.norm(dim=1).max()
    return built_ND * (longest / built_ND.norm(dim=1, keepdim=True)).clamp(max=1.0)


def _resize(model: Any, embedding: Any, head: Any, rows: int) -> None:
    """Set what depends on the number of rows: sizes of the modules and the config, and the row of padding."""
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
        need = "needs a `donor_model`" if method == "omp" else "takes no `donor_model`"
        raise ValueError(
            f"method={method!r} {need}: 'omp' alone copies how a model that already has the new vocabulary writes "
            "each token as a sum of others. Pass such a model, of any size, with method='omp'; without one, use "
            "'mean' or 'weighted'."
        )
    if atoms < 1 or pad_to_multiple_of < 1:
        raise ValueError(f"atoms and pad_to_multiple_of must be at least 1, got {atoms} and {pad_to_multiple_of}.")


def _check_table(model: Any, tokenizer: PreTrainedTokenizerBase, name: str, tokenizer_name: str) -> list[int]:
    """Check that a model has a plain table with a row for each token of its tokenizer, and return the sorted ids."""
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
            "tokenizer of this model. Pass the one that was saved with it."
        )
    return ids


def _averages(match: VocabularyMatch, weights: list[list[float]], mean_weight: float) -> RowCombination:
    """Combine the pieces of each built token by weights that are scaled to sum to 1 with that of the mean."""
    sizes_N = torch.tensor([len(pieces) for pieces in match.built.values()], dtype=torch.int64)
    ids_P = torch.tensor([piece for pieces in match.built.values() for piece in pieces], dtype=torch.int64)
    shares = [(1 - mean_weight) * weight / sum(row) for row in weights for weight in row]
    return RowCombination(ids_P, sizes_N.cumsum(0) - sizes_N, torch.tensor(shares, dtype=torch.float64), mean_weight)


def _pursue(target_ND: Tensor, atom_AD: Tensor, direction_AD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Run `matching_pursuit` on a batch of targets; `direction_AD` are the atoms at length 1."""
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
