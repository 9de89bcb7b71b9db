"""The head of the student and the objective in one function that never holds all logits.

Shapes: N scored tokens, d student width, V vocabulary rows.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cbd_trl.architectures.backbone import Head, product_dtype
from cbd_trl.losses.objective import METRICS, LogitObjective, TermWeights, combine
from cbd_trl.losses.teacher_outputs import AnyTeacherOutputs, ReusedRows

# Logits of one model that are held at a time: on a CPU 128 MB, some hundred rows for the matrix products, each of
# which passes over the head's gradient; on a GPU what fills it.
_CHUNK_ELEMENTS = {"cpu": 2**25}
_CHUNK_ELEMENTS_GPU = 2**26
# Of them, what is compared at a time: on a CPU about what its caches are good for, on a GPU all.
_BLOCK_ELEMENTS = {"cpu": 2**19}


def default_chunk(rows: int, device: torch.device) -> int:
    """Choose how many tokens' logits are held at a time.

    Args:
        rows: of the vocabulary.
        device: that computes them.

    Returns:
        at least 1; the more, the smaller the vocabulary.
    """
    return max(1, _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS_GPU) // rows)


def logits_in_blocks(hidden_ND: Tensor, head: Head) -> Iterator[tuple[slice, Tensor]]:
    """Project to the vocabulary block by block of positions, for what needs no gradient and never all logits at once.

    Args:
        hidden_ND: last hidden states, (N, D).
        head: that reads them; under autocast its product is taken in autocast's dtype.

    Yields:
        which positions, and their logits (n, V) float32, which may be written over.
    """
    dtype = product_dtype(head, hidden_ND.device)
    head = head.to(dtype)
    room, inputs_ND = ReusedRows(), hidden_ND.to(dtype)
    for part in _parts(slice(0, len(hidden_ND)), default_chunk(head.rows, hidden_ND.device), None):
        projected_nV = head.project(inputs_ND[part], room.like(inputs_ND[part], head.rows))
        for rows in _blocks(projected_nV, part, None):
            yield slice(part.start + rows.start, part.start + rows.stop), head.bound(projected_nV[rows])


@torch.compiler.disable
def fused_terms(
    hidden_Nd: Tensor,
    head: Head,
    targets_N: Tensor,
    teacher: AnyTeacherOutputs,
    objective: LogitObjective,
    weights: TermWeights,
    chunk: int | None = None,
    starts: Sequence[int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Project to the vocabulary, compare with the teacher and differentiate, chunk of tokens by chunk of tokens.

    Equal in value and gradient to `objective.terms` on all logits at once (the idea of chunking head and loss
    together: Liger, arXiv 2410.10989, section 3.2). Logits and log-probabilities are float32, and so is the sum of the
    head's gradient over the chunks, whatever the dtype of the products.

    Args:
        hidden_Nd: the student's last hidden states at the scored positions, (N, d).
        head: of the student; under autocast its product is taken in autocast's dtype.
        targets_N: token ids, (N,).
        teacher: its output at the same positions, as the objective reads it.
        objective: the terms.
        weights: of the terms at this step.
        chunk: tokens at a time; None for `default_chunk`.
        starts: where a chunk may begin, increasing, the first of them 0, for an objective that takes several tokens
            together: a chunk grows until the next of them if it must. None for anywhere.

    Returns:
        the sum over tokens of the weighted terms (scalar float32, differentiable once), and every term and every
        metric of `METRICS` per token (N,) without gradient.
    """
    device = hidden_Nd.device
    dtype = product_dtype(head, device)
    size = chunk or default_chunk(head.rows, device)
    # What the chunks need beside tensors that are differentiated.
    work = (
        head.scale, head.softcap, targets_N, teacher, objective, weights, size, dtype, torch.is_grad_enabled(), starts
    )  # fmt: skip
    with torch.autocast(device.type, enabled=False):
        total, *terms = _FusedTerms.apply(hidden_Nd, head.weight_VD, head.bias_V, work)
    return total, dict(zip((*_LOGIT_TERMS, *METRICS), terms, strict=True))


_LOGIT_TERMS = ("kd", "ce", "teacher_ce")


class _FusedTerms(torch.autograd.Function):
    # Gradients are computed in the forward pass, where the logits of a chunk are at hand, and scaled in the backward.

    @staticmethod
    def forward(ctx: Any, hidden_Nd: Tensor, weight_Vd: Tensor, bias_V: Tensor | None, work: tuple) -> Any:
        scale, softcap, targets_N, teacher, objective, weights, size, dtype, training, starts = work
        head = Head(weight_Vd, bias_V, scale, softcap).to(dtype)
        inputs_Nd = hidden_Nd.to(dtype)
        needs = [needed and training for needed in ctx.needs_input_grad[:3]]
        gradients = [
            torch.zeros_like(tensor, dtype=torch.float32 if i else dtype) if tensor is not None and needed else None
            for i, (needed, tensor) in enumerate(zip(needs, (hidden_Nd, weight_Vd, bias_V), strict=True))
        ]
        # Written into, not gathered: small tensors that stay would lie between the large ones that go, and the holes
        # of the C allocator's heap add up to gigabytes.
        terms = {name: hidden_Nd.new_empty(len(hidden_Nd), dtype=torch.float32) for name in _LOGIT_TERMS}
        metrics = {name: torch.empty_like(terms["ce"]) for name in METRICS}
        room, products = ReusedRows(), ReusedRows()
        for part in _parts(slice(0, len(inputs_Nd)), size, starts):
            projected_nV = head.project(inputs_Nd[part], room.like(inputs_Nd[part], head.rows))
            prediction, targets_n = teacher.at(part), targets_N[part]
            for rows in _blocks(projected_nV, part, starts):
                # Before the terms: what this takes is free again when they need memory.
                for name, metric_b in _metrics(head.bound(projected_nV[rows]), targets_n[rows]).items():
                    metrics[name][part][rows] = metric_b
                leaf_bV = projected_nV[rows].detach().requires_grad_(any(needs))
                with torch.set_grad_enabled(any(needs)):
                    found = objective.terms(head.bound(leaf_bV), prediction.rows(rows), targets_n[rows], weights)
                    loss = combine(found, weights).sum()
                if loss.requires_grad:
                    # The logits have done their work: the slope takes their place.
                    projected_nV[rows] = torch.autograd.grad(loss, leaf_bV)[0]
                for name, term_N in terms.items():
                    term_N[part][rows] = found[name].detach()
            if any(needs) and (weights.kd or weights.ce):
                _add_gradients(gradients, projected_nV, inputs_Nd[part], head.weight_VD, part, products)
        ctx.gradients = gradients
        ctx.dtypes = [t.dtype if t is not None else None for t in (hidden_Nd, weight_Vd, bias_V)]
        returned = (*terms.values(), *metrics.values())
        ctx.mark_non_differentiable(*returned)
        return combine(terms, weights).sum(), *returned

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *unused: Any) -> Any:
        if ctx.gradients is None:
            raise RuntimeError(
                "The fused loss was differentiated twice: its gradients are kept for one backward pass. Compute the "
                "loss again instead of using retain_graph=True."
            )
        # In place: the gradient of the head is as large as the head.
        scaled = [None if g is None else g.mul_(slope) for g in ctx.gradients]
        ctx.gradients = None
        return *(None if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes, strict=True)), None


def _metrics(logits_bV: Tensor, targets_b: Tensor) -> dict[str, Tensor]:
    """The metrics of SFT at some positions; see `METRICS`."""
    probabilities_bV, best_b1 = torch.softmax(logits_bV, -1), logits_bV.argmax(-1, keepdim=True)
    # log of the sum of exp(logits), from a token of which both are known.
    norm_b = (logits_bV.gather(1, best_b1) - probabilities_bV.gather(1, best_b1).log())[:, 0]
    # An impossible token adds nothing: 0 times infinity would be NaN.
    mean_b = torch.linalg.vecdot(probabilities_bV, logits_bV.clamp(min=torch.finfo(logits_bV.dtype).min))
    return {"entropy": norm_b - mean_b, "mean_token_accuracy": (best_b1[:, 0] == targets_b).float()}


def _parts(whole: slice, size: int, starts: Sequence[int] | None) -> Iterator[slice]:
    """Cut a range into parts of a size, or where it may be cut next to that."""
    start = whole.start
    while start < whole.stop:
        end = min(start + size, whole.stop)
        if starts is not None and end < whole.stop:
            index = bisect_right(starts, end) - 1
            # No cut within reach: on to the next one.
            index += starts[index] <= start
            end = starts[index] if index < len(starts) else whole.stop
        yield slice(start, end)
        start = end


def _blocks(projected_nV: Tensor, part: slice, starts: Sequence[int] | None) -> Iterator[slice]:
    """What is compared at a time, counted from the start of the part."""
    size = max(1, _BLOCK_ELEMENTS.get(projected_nV.device.type, projected_nV.numel()) // projected_nV.shape[1])
    for block in _parts(part, size, starts):
        yield slice(block.start - part.start, block.stop - part.start)


def _add_gradients(
    gradients: list[Tensor | None],
    slope_nV: Tensor,
    inputs_nd: Tensor,
    weight_Vd: Tensor,
    part: slice,
    products: ReusedRows,
) -> None:
    hidden_Nd, head_Vd, bias_V = gradients
    if hidden_Nd is not None:
        torch.mm(slope_nV, weight_Vd, out=hidden_Nd[part])
    if head_Vd is not None:
        if slope_nV.dtype == head_Vd.dtype:
            head_Vd.addmm_(slope_nV.T, inputs_nd)
        else:
            head_Vd += torch.mm(slope_nV.T, inputs_nd, out=products.like(slope_nV.T, inputs_nd.shape[1]))
    if bias_V is not None:
        bias_V += slope_nV.sum(0, dtype=torch.float32)
