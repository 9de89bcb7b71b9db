"""Load a causal language model: safetensors only, without code of its repository, and no weight left random."""

import copy
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.utils import cached_file, find_adapter_config_file, logging

from cbd_trl.utils.formatting import readable_name

# Of the options of `from_pretrained`, those that locate the files.
_WHERE = ("revision", "token", "subfolder", "cache_dir", "local_files_only")
# Buffers that old checkpoints hold and models compute: transformers knows those of most classes, not of all.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$")
# What wrappers put into the keys of the model inside, and how to save the model itself.
_WRAPPERS = {
    "_orig_mod.": "torch.compile wrapped it: save the model inside, `model._orig_mod.save_pretrained(...)`",
    "_fsdp_wrapped_module.": "FSDP wrapped it: save its full state dict, `trainer.save_model(...)`",
    "_checkpoint_wrapped_module.": "activation checkpointing wrapped it: save the model inside",
    "lora_": "a LoRA adapter is still on it: `model.merge_and_unload().save_pretrained(...)`",
    "base_layer.": "a PEFT adapter is still on it: `model.merge_and_unload().save_pretrained(...)`",
    "base_model.model.": "PEFT wrapped it: `model.merge_and_unload().save_pretrained(...)`",
    "module.": "DataParallel or DeepSpeed wrapped it: save the model inside, `model.module.save_pretrained(...)`",
}
_NAMED = 5
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_CONVERT = (
    "A pickle can run code, so it is not read. If you trust it, convert it once: "
    "`AutoModelForCausalLM.from_pretrained(place, use_safetensors=False).save_pretrained(folder)`, and give that."
)
_CONVERT_GGUF = (
    "Convert it once: `AutoModelForCausalLM.from_pretrained(place, gguf_file=..., dtype=torch.float32)`, and save it "
    "without its marks of quantization."
)


def load_causal_lm(place: str | Path, *, role: str, adapters: bool = False, **options: Any) -> PreTrainedModel:
    """Load a causal LM, every weight of it from its checkpoint.

    transformers fills what a checkpoint lacks with random numbers and leaves out what it does not know; here both are
    refused, but for what it ignores by design: buffers that the model computes, a tied head, older names of keys. Only
    safetensors (or the GGUF file that is named) are read, and no code of the repository is run unless
    `trust_remote_code` is among the options. Of a multimodal checkpoint the whole model is loaded.

    Args:
        place: path or Hub id.
        role: what an error calls it, such as "source".
        adapters: take the folder of a PEFT adapter, too: its base, with the adapter on top.
        options: of `from_pretrained`.

    Returns:
        the model, in eval mode.

    Raises:
        ValueError: keys are missing, unknown or of another shape; files are lost, cut off or not safetensors; or it is
            an adapter and none may be.
        OSError: there is nothing of that name.
        ImportError: it is quantized, or is to be, by a package that is not installed.
    """
    name = f"The {role} {readable_name(str(place))!r}"
    options = {"trust_remote_code": False, **options}
    adapter = _adapter(place, options)
    if adapter is not None:
        if not adapters:
            raise ValueError(_merge(f"{name} is a PEFT adapter"))
        return _with_adapter(place, adapter, role, options)
    check_is_model_folder(place, name)
    # Sizes that differ are named below, with everything else.
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    if options.get("gguf_file") is None:
        options["use_safetensors"] = True
    try:
        model, info = _loaded(place, options)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        if (reason := _unreadable(place, options, error)) is not None:
            raise ValueError(f"{name} {reason}") from error
        raise
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError):
            _look_again(place, options, name)
        raise
    _check_keys(model, info, name)
    return model


def check_is_model_folder(place: str | Path, name: str) -> None:
    """Check that a folder is not one of model folders, such as a chain or the output of a training.

    Args:
        place: path or Hub id.
        name: begins the error.

    Raises:
        ValueError: naming the model folders inside.
    """
    folder = Path(place)
    if (folder / "config.json").exists():
        return
    if inside := sorted(file.parent.name for file in folder.glob("*/config.json")):
        raise ValueError(
            f"{name} is not a model folder: it has no config.json, but these folders in it do: {', '.join(inside)}. "
            f"Give one of them, such as {folder / inside[0]}."
        )


def check_checkpoint(place: str | Path, *, role: str, adapters: bool = False, **options: Any) -> None:
    """Check a checkpoint as `load_causal_lm` would, by the headers of the files: in a second, before any long work.

    What only loading can find out is left to it: quantized checkpoints, adapters, and models with code of their own.

    Args:
        place: path or Hub id.
        role: what an error calls it.
        adapters: whether an adapter may be loaded, too.
        options: of `from_pretrained`; only those that locate the files count.

    Raises:
        ValueError: as `load_causal_lm`.
        OSError: there is nothing of that name.
    """
    where = _where(options)
    later = options.get("trust_remote_code") or options.get("gguf_file") or is_deepspeed_zero3_enabled()
    if later or (adapters and _adapter(place, where)):
        return
    check_no_adapter(place, role, **where)
    with suppress(OSError, ValueError):  # no config to read: loading raises
        if getattr(_config(place, where), "quantization_config", None) is not None:
            return
    of_files = {key: options[key] for key in ("variant", "key_mapping") if key in options}
    with quiet():
        load_causal_lm(place, role=role, device_map="meta", **where, **of_files)


def check_no_adapter(place: str | Path, role: str, **where: Any) -> None:
    """Check that a place is not the folder of a PEFT adapter.

    Args:
        place: path or Hub id.
        role: what an error calls it.
        where: `revision` and `token` of a Hub id.

    Raises:
        ValueError: there is an adapter.
    """
    if _adapter(place, where) is not None:
        raise ValueError(_merge(f"The {role} {readable_name(str(place))!r} is a PEFT adapter"))


def check_plain(model: Any, role: str) -> None:
    """Check that the weights of a model in memory are a plain model's.

    Args:
        model: what was given for a model.
        role: what an error calls it.

    Raises:
        TypeError: it is not a model of transformers, but one that `torch.compile` or a trainer wrapped.
        ValueError: it has a PEFT adapter, or no head.
    """
    if hasattr(model, "get_base_model") or _has_adapter_layers(model):
        raise ValueError(_merge(f"The {role} is a {type(model).__name__} with a PEFT adapter"))
    if not isinstance(model, PreTrainedModel):
        inside = next(
            (f" Give the model inside: `model.{at}`." for at in ("_orig_mod", "module") if at in dir(model)), ""
        )
        raise TypeError(
            f"The {role} is a {type(model).__name__}: it must be a model of transformers, the path of a folder with "
            f"config.json, or a Hub id.{inside}"
        )
    check_writes(model, role)


def check_at_hand(model: Any, role: str) -> None:
    """Check that the weights of a model can be read, and not only run.

    Args:
        model: in memory.
        role: what an error calls it.

    Raises:
        ValueError: a `device_map` offloaded some of them.
    """
    if away := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(
            f"The {role} has {len(away)} weights that its device_map offloaded ({_listed(away)}), and they are to be "
            "read and changed, not only run. Load it without device_map: it then lies in the CPU's memory, and is "
            "moved to the device for what is run there."
        )


def check_writes(model: Any, role: str) -> None:
    """Check that a model predicts the next token of a text.

    Args:
        model: in memory.
        role: what an error calls it.

    Raises:
        ValueError: it has no head, or is an encoder with a decoder.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or getattr(model.config, "is_encoder_decoder", False):
        reason = (
            "has no head over the vocabulary" if head is None else "writes an answer to a text, not its next token"
        )
        raise ValueError(
            f"The {role} is a {type(model).__name__}, which {reason}: there are no logits to distill. Give a "
            "causal language model, such as `AutoModelForCausalLM` loads."
        )


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Take the config of the language model out of a multimodal one, if transformers has a causal LM for it.

    Args:
        config: of any model.

    Returns:
        a copy with the head that the whole model has; the config itself of a text model, of a quantized one, and where
        the language model is not one by itself.
    """
    text = config.get_text_config()
    whole = text is config or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING
    if whole or getattr(config, "quantization_config", None) is not None:
        return config
    text = copy.deepcopy(text)
    text.tie_word_embeddings = config.tie_word_embeddings
    return text


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """Take the language model out of a multimodal one, as a causal LM that shares its weights.

    Args:
        model: a causal LM.

    Returns:
        the model itself where `text_config` gives its config as it is.
    """
    whole: Any = model
    config = text_config(whole.config)
    if config is whole.config:
        return model
    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    state = {f"{cls.base_model_prefix}.{key}": tensor for key, tensor in whole.get_decoder().state_dict().items()}
    state |= {f"lm_head.{key}": tensor for key, tensor in whole.get_output_embeddings().state_dict().items()}
    with quiet():
        text, info = cls.from_pretrained(
            None, config=config, state_dict=state, dtype=model.dtype, output_loading_info=True
        )
    _check_keys(text, info, f"The language model of {type(model).__name__}")
    text.generation_config, text.name_or_path = whole.generation_config, whole.name_or_path
    text.config._name_or_path = whole.name_or_path
    return text


def is_multimodal(model: Any) -> bool:
    """Check whether the language model is a part of this one, beside a tower for images or sounds.

    Args:
        model: a causal LM.
    """
    return model.config.get_text_config() is not model.config


def is_spread(model: Any) -> bool:
    """Check whether a `device_map` put the parts of a model on several devices, or off them.

    Args:
        model: of transformers.
    """
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def has_float64(device: torch.device) -> bool:
    """Whether a device is known to calculate in float64, which Apple's, and others, do not."""
    return device.type in ("cpu", "cuda")


@contextmanager
def on_device(model: PreTrainedModel, device: torch.device) -> Iterator[PreTrainedModel]:
    """Move a model to a device for a time, and back to its own after it.

    One that is spread over devices stays where it is.

    Args:
        model: the caller's.
        device: where it is to be.
    """
    moved: Any = model
    if is_spread(moved):
        yield moved
        return
    own = moved.device
    moved.to(device)
    try:
        yield moved
    finally:
        moved.to(own)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode for a time, and back in the mode that it was in, whatever happened."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def emulates_bf16() -> bool:
    """Check whether the GPU only emulates bfloat16, slower than float32, as those before Ampere do (T4, V100)."""
    return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)


def is_attention_kernel(name: str | None) -> bool:
    """Check whether an attention is a kernel that not every device and dtype has.

    Args:
        name: an `attn_implementation`, such as "flash_attention_2", "kernels-community/flash-attn3" or "sdpa".
    """
    return name is not None and any(part in name for part in ("flash", "flex", "/"))


@contextmanager
def portable_attention(model: Any) -> Iterator[None]:
    """Within it a model with an attention kernel (FlashAttention, FlexAttention, one of the Hub) attends with SDPA, if
    its weights are in float32 or on the CPU; with "eager" where the family has no SDPA.

    FlashAttention takes tensors in 16 bits on an accelerator alone. In a training autocast makes them of float32
    weights; where a model is checked or measured apart from it, nothing does.

    Args:
        model: of transformers, not wrapped.
    """
    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    kept = [(config, config._attn_implementation) for config in configs.values()]
    runs = model.dtype in (torch.float16, torch.bfloat16) and model.device.type != "cpu"
    if not runs and any(is_attention_kernel(name) for _, name in kept):
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        for config, name in kept:
            # Its setter would look for the kernel again, on the Hub too, and reach into the configs inside.
            config._attn_implementation_internal = name


@contextmanager
def quiet(messages: bool = False) -> Iterator[None]:
    """Hide the progress bars of transformers, and its messages below errors.

    For what is in memory already or is loaded again later; hundreds of weights load in a blink, and one bar is enough.

    Args:
        messages: whether they are shown.
    """
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if not messages:
        logging.set_verbosity(max(verbosity, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _config(place: str | Path, options: Mapping[str, Any]) -> PretrainedConfig:
    code = bool(options.get("trust_remote_code"))
    return AutoConfig.from_pretrained(place, trust_remote_code=code, **_where(options))


def _auto_class(place: str | Path, options: Mapping[str, Any]) -> Any:
    """Choose `AutoModelForCausalLM` or, for a multimodal model that it does not know, the class that does."""
    if options.get("gguf_file") is not None:
        return AutoModelForCausalLM
    config = options.get("config") or _config(place, options)
    multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if multimodal and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _loaded(place: str | Path, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    return _auto_class(place, options).from_pretrained(place, **options)


def _where(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in _WHERE if options.get(key) is not None}


def _adapter(place: str | Path, options: Mapping[str, Any]) -> str | None:
    """Find the config file of the PEFT adapter at a place, None where there is none."""
    with suppress(OSError):  # nothing of that name: loading raises
        return find_adapter_config_file(str(place), **_where(options))
    return None


def _with_adapter(place: str | Path, adapter: str, role: str, options: Mapping[str, Any]) -> PreTrainedModel:
    """Load the base of an adapter, with the adapter on top, both of them whole."""
    name, where = readable_name(str(place)), _where(options)
    if cached_file(str(place), _ADAPTER_WEIGHTS, _raise_exceptions_for_missing_entries=False, **where) is None:
        raise ValueError(
            f"The {role} {name!r} is a PEFT adapter without {_ADAPTER_WEIGHTS}. A pickle can run code, so it is not "
            "read. If you trust it, load and save it once with peft."
        )
    base = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
    of_base = {key: value for key, value in options.items() if key not in ("revision", "subfolder")}
    model: Any = load_causal_lm(base, role=f"{role}'s base", **of_base)
    info = model.load_adapter(str(place), adapter_kwargs=where, dtype=model.dtype, ignore_mismatched_sizes=True)
    _check_keys(model, info.to_dict(), f"The adapter of the {role} {name!r}")
    return model


def _look_again(place: str | Path, options: Mapping[str, Any], name: str) -> None:
    """Find what makes transformers fail before it reports the keys.

    That is a part of a quantized checkpoint that is missing, or a tied head of another size than the table.
    """
    config = _config(place, options)
    tied, quantized = config.get_text_config().tie_word_embeddings, hasattr(config, "quantization_config")
    for part in {id(one): one for one in (config, config.get_text_config())}.values():
        part.tie_word_embeddings = False
        vars(part).pop("quantization_config", None)
    plain = {key: value for key, value in options.items() if key != "quantization_config"}
    with quiet():
        model, info = _loaded(place, {**plain, "config": config, "device_map": "meta"})
    if tied:
        info["missing_keys"] -= _head_keys(model)
    if quantized:
        # Packed weights have other shapes, and other names beside that of their module.
        stored = {key.rpartition(".")[0] for key in info["unexpected_keys"]}
        missing = {key for key in info["missing_keys"] if key.rpartition(".")[0] not in stored}
        info |= {"missing_keys": missing, "unexpected_keys": set(), "mismatched_keys": set()}
    _check_keys(model, info, name)


def _check_keys(model: Any, info: Mapping[str, Any], name: str) -> None:
    """Check that transformers found nothing missing, unknown or of another shape.

    Args:
        model: that was loaded.
        info: the loading info.
        name: begins the error.
    """
    missing = set(info["missing_keys"])
    unknown = {key for key in info["unexpected_keys"] if not _COMPUTED.search(key)}
    if getattr(model, "is_quantized", False):
        # A format's scales and maps, which a kernel may do without; its weights are packed under their own names.
        unknown = {key for key in unknown if key.endswith((".weight", ".bias"))}
    shapes = {key: (tuple(stored), tuple(wanted)) for key, stored, wanted in info["mismatched_keys"]}
    if not (missing or unknown or shapes):
        return
    found = [
        f"{len(keys)} weights {what}: {_listed(keys)}"
        for what, keys in (("are missing", missing), ("are not known to it", unknown))
        if keys
    ]
    if shapes:
        different = [f"{key} ({list(stored)}, not {list(wanted)})" for key, (stored, wanted) in sorted(shapes.items())]
        found.append(f"{len(shapes)} weights have another shape: {_listed(different)}")
    raise ValueError(
        f"{name} is not a whole {type(model).__name__}: {'; '.join(found)}. What is missing would be random numbers, "
        f"and what is not known left out. {_way_out(model, missing, unknown, shapes)}"
    )


def _way_out(model: Any, missing: set[str], unknown: set[str], shapes: Collection[str]) -> str:
    for part, what in _WRAPPERS.items():
        if any(part in key for key in unknown):
            return f"The keys carry `{part}`: {what}."
    prefixes = Counter(
        key.removesuffix(own) for key in unknown for own in missing if key.endswith(f".{own}") and key != own
    )
    if prefixes:
        prefix = prefixes.most_common(1)[0][0]
        return f"The keys carry `{prefix}`: save the model inside the one that has this prefix."
    if missing and missing <= _head_keys(model):
        return (
            "It is a model without a head. Give one that was saved as a causal language model (or, if the head is the "
            "table, set tie_word_embeddings=true in its config.json)."
        )
    if shapes:
        return "The config.json is another model's, or was not saved after a change such as resized embeddings."
    if missing:
        return "A part was lost in saving, converting or copying: fetch or save it again."
    return (
        "The config.json is another model's, such as one with fewer layers, or a part was added to it, such as a "
        "value head. If the weights are to be left out, load the model yourself and give it as a model."
    )


def _head_keys(model: Any) -> set[str]:
    head = model.get_output_embeddings()
    of_head = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    return {key for key, parameter in model.named_parameters() if id(parameter) in of_head}


def _has_adapter_layers(model: Any) -> bool:
    return isinstance(model, nn.Module) and any(hasattr(module, "base_layer") for module in model.modules())


def _unreadable(place: str | Path, options: Mapping[str, Any], error: Exception) -> str | None:
    """Explain what is wrong with the files of a place; None where there is no such place, or it cannot be reached."""
    again = "Fetch or save it again."
    if isinstance(error, SafetensorError):
        return f"has a weight file that is damaged or cut off ({error}). {again}"
    if isinstance(error, json.JSONDecodeError):
        return f"has an index of its weight files that is not valid JSON ({error}). {again}"
    if "is not a valid JSON file" in str(error):
        return f"has a config.json that is not valid JSON. {again}"
    folder = Path(place) / (options.get("subfolder") or "")
    if isinstance(error, FileNotFoundError):
        lost = os.path.basename(str(error.filename or str(error).rsplit(" ", 1)[-1]))
        return f"has lost a weight file that its index names: {lost}. {again}"
    if folder.is_dir() and (folder / "config.json").is_file():
        found = sorted(
            file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".h5", ".gguf")
        )
        if any(name.endswith(".gguf") for name in found):
            return f"has no model.safetensors but {_listed(found)}. {_CONVERT_GGUF}"
        return f"has no model.safetensors{f' but {_listed(found)}' if found else ''}. {_CONVERT if found else again}"
    if "model.safetensors" in str(error):
        return f"has no model.safetensors ({str(error).splitlines()[0]}). {_CONVERT}"
    return None


def _merge(found: str) -> str:
    return (
        f"{found}, not a plain model. Merge it first: `PeftModel.from_pretrained(base, adapter).merge_and_unload()`, "
        "or `model.merge_and_unload()` of a PEFT model in memory. Give what that returns, or a folder that holds it."
    )


def _listed(names: Collection[str]) -> str:
    some = sorted(names)[:_NAMED]
    return ", ".join(some) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
