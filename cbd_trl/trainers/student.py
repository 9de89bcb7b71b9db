"""A student given by name, and the tokenizer of any: loaded as `trl.SFTTrainer` would, but by the safe loader."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.utils.model_folders import name_remote_code
from cbd_trl.utils.modeling import is_multimodal, load_causal_lm

# Where every process holds a whole model, "auto" would spread each over all devices.
_ONE_EACH = ("MULTI_GPU", "DEEPSPEED")


def load_student(name: str, args: DistillConfig, quantization_config: Any = None) -> PreTrainedModel:
    """Load the student, in float32 and on the accelerator unless `args.model_init_kwargs` has it otherwise.

    Args:
        name: path or Hub id.
        args: of the run.
        quantization_config: the trainer's argument.

    Raises:
        ValueError: weights are missing, unknown, of another shape or in no safetensors; two quantizations are given.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": args.trust_remote_code}
    options |= args.model_init_kwargs or {}  # type: ignore[arg-type]  # a string on the command line, a dict once parsed
    if options["trust_remote_code"]:
        name_remote_code(name, options.get("revision"))
    if quantization_config is not None:
        if "quantization_config" in options:
            raise ValueError(
                "quantization_config was given as an argument of the trainer and in model_init_kwargs: there can be "
                "one. Give the trainer's argument alone."
            )
        options["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in _ONE_EACH:
        options["device_map"] = None
    else:
        options.setdefault("device_map", None if args.device.type in ("cpu", "mps") else "auto")
    return load_causal_lm(name, role="student", **options)


@contextmanager
def student_loaded(model: Any, args: DistillConfig, named: bool) -> Iterator[None]:
    """The arguments as SFTTrainer is to see them for a student that is there.

    Args:
        model: the student.
        args: changed for a time: how to load a student by name is settled. What stays: a multimodal student's towers
            get no gradient from text, so DDP has to look for them.
        named: it was loaded by name.
    """
    options = args.model_init_kwargs
    if named:
        args.model_init_kwargs = None
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")  # type: ignore[union-attr]
    if is_multimodal(model) and args.ddp_find_unused_parameters is None and not reentrant:
        args.ddp_find_unused_parameters = True
    try:
        yield
    finally:
        args.model_init_kwargs = options


def find_student_tokenizer(model: Any, args: DistillConfig, named: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a student was saved with, also where a processor for images goes around it.

    Args:
        model: the student.
        args: of the run.
        named: it was loaded by name, from the revision that `args` has.

    Returns:
        None where SFTTrainer is to look: for a text model in memory.
    """
    if not named and not is_multimodal(model):
        return None
    options: Any = (args.model_init_kwargs or {}) if named else {}
    where = {key: options[key] for key in ("revision", "token") if key in options}
    return AutoTokenizer.from_pretrained(model.config._name_or_path, trust_remote_code=args.trust_remote_code, **where)
