"""A causal LM up to its last hidden state, from inside its own forward.

DDP, FSDP and DeepSpeed hook the forward of the model they wrap: parameters are whole, and gradients watched, only
within it. So what replaces the dense logits has to run there too.
"""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from accelerate.utils.operations import ConvertOutputsToFp32
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from cbd_trl.utils.modeling import in_eval_mode, portable_attention


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: softcap(scale x (hidden W^T + bias)).

    Attributes:
        weight_VD: output embedding, (V, D).
        bias_V: (V,), or None.
        scale: multiplies the projection (Cohere, Granite).
        softcap: bounds the logits, softcap x tanh(logits / softcap) (Gemma 2); None for no bound.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def rows(self) -> int:
        """Vocabulary rows V."""
        return self.weight_VD.shape[0]

    def to(self, place: torch.dtype | torch.device) -> "Head":
        """The same head in a dtype or on a device; without a copy where it is so already."""
        bias_V = None if self.bias_V is None else self.bias_V.to(place)
        return Head(self.weight_VD.to(place), bias_V, self.scale, self.softcap)

    def project(self, hidden_ND: Tensor, out: Tensor | None = None) -> Tensor:
        """The matrix product alone.

        Args:
            hidden_ND: (N, D), in the dtype of the weight.
            out: what to write it into, (N, V), where nothing is differentiated; None for a new tensor.

        Returns:
            (N, V) in that dtype.
        """
        if out is None:
            return torch.nn.functional.linear(hidden_ND, self.weight_VD, self.bias_V)
        if self.bias_V is None:
            return torch.mm(hidden_ND, self.weight_VD.T, out=out)
        return torch.addmm(self.bias_V, hidden_ND, self.weight_VD.T, out=out)

    def bound(self, projected_NV: Tensor) -> Tensor:
        """Logits from what `project` returned, in float32 whatever the dtype of the product.

        Args:
            projected_NV: (N, V).

        Returns:
            (N, V) float32.
        """
        logits_NV = projected_NV.float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits of hidden states.

        Args:
            hidden_ND: (N, D), any float dtype.

        Returns:
            (N, V) float32.
        """
        return self.bound(self.to(hidden_ND.dtype).project(hidden_ND))


def product_dtype(head: Head, device: torch.device) -> torch.dtype:
    """The dtype in which hidden states are multiplied by a head: autocast's where it is on, else the head's own."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return head.weight_VD.dtype


# How many tokens the own logits of a model are compared with `Head` on.
_PROBE_LENGTH = 4
# What trainers leave on the object of a model.
_PATCHES = ("forward", "_original_forward", "_is_accelerate_prepared")


def open_forward(model: nn.Module) -> None:
    """Let `model(**inputs, inside=f)` return f(last hidden state (B, T, D)) instead of logits.

    Without `inside` the forward is what it was. To be called on the causal LM itself, before anything wraps it. What
    other trainers left on it is taken off (see `take_off_patches`), save that TRL's own still find their fused head.

    Args:
        model: a causal LM with a `base_model`.
    """
    fused = next((forward for forward in _forwards(model) if _takes(forward, "fused_lm_head")), None)
    take_off_patches(model)
    plain = _forwards(model)[0]

    # What it calls gets the model that runs, so that a deep copy computes with its own weights.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, inside: Callable[[Tensor], Any] | None = None, **kwargs: Any) -> Any:
        if inside is not None:
            return _run_inside(inside, self.base_model(*args, **kwargs).last_hidden_state)
        if kwargs.pop("fused_lm_head", False) and fused is not None:
            return fused(self, *args, fused_lm_head=True, **kwargs)
        return plain(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def last_hidden(model: Any, **inputs: Tensor) -> Tensor:
    """Run a causal LM without its head.

    Args:
        model: not wrapped; its forward need not be opened.
        inputs: `input_ids` (B, T), and an `attention_mask` where there is padding.

    Returns:
        what its head reads, (B, T, D).
    """
    return model.base_model(**inputs, use_cache=False).last_hidden_state


def take_off_patches(model: nn.Module) -> None:
    """Give a model its own forward again, where trainers have put others on the object itself.

    TRL's fused head holds on to the model that it was made for, so that a deep copy would compute with the weights of
    the first; accelerate's mixed precision would stay for a trainer that asks for another. What is under them stays: a
    hook of accelerate (offloading), or a forward that somebody else put there.

    Args:
        model: a causal LM, not wrapped; changed in place. One that FSDP sharded is left as it is.
    """
    if "forward" not in model.__dict__ or _in_fsdp(model):
        return
    *patches, own = _forwards(model)
    if own is type(model).forward:
        del model.forward
    elif patches:
        model.forward = types.MethodType(own, model)
    if model.__dict__.pop("_original_forward", None) is not None:
        # With this mark accelerate would not put its mixed precision there again.
        model.__dict__.pop("_is_accelerate_prepared", None)


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Within it a model of somebody else's, who may go on training it, runs without the patches of trainers."""
    kept = {name: model.__dict__[name] for name in _PATCHES if name in model.__dict__}
    take_off_patches(model)
    try:
        yield
    finally:
        model.__dict__.update(kept)


def _forwards(model: nn.Module) -> list[Callable[..., Any]]:
    """What a model's forward calls, from the outermost patch of a trainer to its own; all take the model first."""
    own = model.__dict__.get("forward")
    found = [type(model).forward if own is None else _with_self(own)]
    while (inner := _inside_patch(found[-1])) is not None:
        found.append(inner)
    return found


def _with_self(forward: Any) -> Callable[..., Any]:
    """A forward found on an object, as a function that takes the object first."""
    if isinstance(forward, types.MethodType):
        return forward.__func__
    if isinstance(forward, functools.partial):  # a hook of accelerate, which binds the object so
        return forward.func
    return lambda model, *args, **kwargs: forward(*args, **kwargs)


def _inside_patch(forward: Any) -> Callable[..., Any] | None:
    """What the forward of a trainer calls, as a function that takes the object first; None for any other forward."""
    if isinstance(forward, types.FunctionType):
        names = zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True)
        held = {name: cell.cell_contents for name, cell in names}
        if _takes(forward, "fused_lm_head"):
            return _with_self(held["original_forward"])
        if _takes(forward, "inside"):
            return held["fused"] or held["plain"]
        if isinstance(wrapped := getattr(forward, "__wrapped__", None), ConvertOutputsToFp32):
            # Around torch's decorator for autocast.
            return wrapped.__wrapped__.__wrapped__
    return None


def _takes(forward: Any, keyword: str) -> bool:
    return keyword in (getattr(forward, "__kwdefaults__", None) or {})


def keep_trainable(model: nn.Module) -> None:
    """Let a quantized model run in eval mode now and be trained later.

    On CPUs with bfloat16 instructions bitsandbytes packs 4-bit weights at the first forward in eval mode, after which
    no gradient passes them, silently: an evaluation during training would end it.

    Args:
        model: changed in place; nothing happens where nothing is quantized so.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


# Where the forward is compiled the graph ends here: what runs inside differs from batch to batch.
@torch.compiler.disable
def _run_inside(inside: Callable[[Tensor], Any], hidden_BTD: Tensor) -> Any:
    return inside(hidden_BTD)


@contextmanager
def output_head(model: Any, keep: bool = False) -> Iterator[Head]:
    """Gather the head of a causal LM, whole, with the logit transforms of its config.

    Within the model's forward where it is sharded. Offloaded parameters (accelerate) are brought to their device,
    partitioned ones (ZeRO-3, FSDP 2) gathered, for the time of the context.

    Args:
        model: a causal LM, not wrapped.
        keep: yield copies of what is only there for a time, to be used later.

    Yields:
        a head that shares the model's parameters.

    Raises:
        ValueError: if the output embedding is quantized.
    """
    module = model.get_output_embeddings()
    offloaded = has_offloaded_params(module)
    # ZeRO-3 gathers what a forward reads, and again for its gradient. Gathering here would give it back too early.
    with align_module_device(module):
        weight, bias = (_whole(getattr(module, name, None)) for name in ("weight", "bias"))
        if weight is None or not weight.is_floating_point():
            kind = "no matrix" if weight is None else f"quantized ({weight.dtype})"
            raise ValueError(
                f"The output head of {type(model).__name__} is {kind}, but the loss multiplies by its weight. Leave "
                "it out of the quantization, such as with llm_int8_skip_modules=['lm_head']."
            )
        if keep and (offloaded or hasattr(module.weight, "ds_id") or _in_fsdp(model)):
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        config = model.config.get_text_config()
        yield Head(weight, bias, _logit_scale(config), getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def check_causal(model: Any) -> None:
    """Check that a model does not read what follows a token, as an encoder does: it would predict what it has read.

    Args:
        model: with an opened forward, in eval mode, not wrapped.

    Raises:
        ValueError: if another last token changes what is before it, or its states are not finite.
    """
    if not _runs_here(model):
        return
    ids = _probe_ids(model)
    other = ids.clone()
    other[0, -1] = 0
    with portable_attention(model):
        one, two = (
            model(input_ids=each, use_cache=False, inside=lambda hidden: hidden[0, :-1]) for each in (ids, other)
        )
    _check_finite(model, one, two)
    if not torch.allclose(one, two, rtol=1e-2, atol=1e-2 * one.std().item()):
        raise ValueError(
            f"{type(model).__name__} reads what follows a token, as an encoder does, so its output for the "
            "next one is not a prediction. Give a causal language model."
        )


@torch.no_grad()
def check_head(model: Any) -> None:
    """Check that a model's logits are its head of its last hidden state: else the loss would silently be another one.

    Args:
        model: a causal LM, not wrapped.

    Raises:
        ValueError: if the two differ on a few tokens, or are not finite.
    """
    if not _runs_here(model):
        return
    ids = _probe_ids(model)
    with in_eval_mode(model), portable_attention(model):
        own = model(input_ids=ids, use_cache=False).logits[0].float()
        with output_head(model) as head:
            hidden = last_hidden(model, input_ids=ids)[0]
            ours = head.logits(hidden.to(head.weight_VD.device, head.weight_VD.dtype)).to(own.device)
    _check_finite(model, own, ours)
    if own.shape != ours.shape or not torch.allclose(own, ours, rtol=1e-2, atol=1e-2 * own.std().item()):
        raise ValueError(
            f"The logits of {type(model).__name__} are not its output embedding times its last hidden state, with the "
            "logit scale and soft-capping of its config, which is how the loss computes them without holding all of "
            "them in memory. Distill a model with a plain head."
        )


def _check_finite(model: Any, *computed: Tensor) -> None:
    if not all(tensor.isfinite().all() for tensor in computed):
        raise ValueError(
            f"What this {type(model).__name__} computes is not finite (NaN or infinity): its weights are damaged, or "
            "its dtype is too narrow. Load it from a good copy, or in bfloat16 or float32."
        )


def _runs_here(model: Any) -> bool:
    # Offloaded or sharded already: there is nothing to compare with.
    return not any(p.is_meta or p.numel() == 0 for p in model.parameters())


def _probe_ids(model: Any) -> Tensor:
    return torch.arange(1, 1 + _PROBE_LENGTH, device=model.get_input_embeddings().weight.device)[None]


def _logit_scale(config: Any) -> float:
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (scale := getattr(config, name, None)) is not None:
            return float(scale)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # Granite and MiniCPM divide by it, HyperCLOVA X multiplies.
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def _whole(parameter: Tensor | None) -> Tensor | None:
    if not isinstance(parameter, DTensor):
        return parameter
    # FSDP has not gathered it, because its module is never called: nor would it average the gradient.
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _in_fsdp(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    # FSDP 2, and the mark that FSDP 1 leaves on what it manages.
    return isinstance(model, FSDPModule) or getattr(model, "_is_fsdp_managed_module", False)
