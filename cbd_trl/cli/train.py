"""`cbd-trl distill` and `cbd-trl bridge`: train a student from a teacher."""

from typing import Any

from cbd_trl.cli.parsing import Command, UsageError, evaluation_rows, loading_options, require, training_rows
from cbd_trl.trainers.options import BridgeOptions, DistillOptions

_USAGE = (
    "--model_name_or_path STUDENT --teacher_model_name_or_path TEACHER --dataset_name DATA --output_dir DIR [options]"
)


def _distill_types() -> list[type]:
    from trl import ModelConfig, ScriptArguments

    from cbd_trl.trainers.distill_config import DistillConfig

    return [ScriptArguments, DistillConfig, ModelConfig]


def _bridge_types() -> list[type]:
    from trl import ModelConfig, ScriptArguments

    from cbd_trl.trainers.bridge_config import BridgeDistillConfig

    return [ScriptArguments, BridgeDistillConfig, ModelConfig]


DISTILL = Command(
    "distill",
    _USAGE,
    (
        "Train a student (--model_name_or_path) on a dataset to predict what --teacher_model_name_or_path does, "
        "what --teacher_cache holds of one, or what its own base does (--self_distillation with --use_peft)."
    ),
    own=(DistillOptions,),
    types=_distill_types,
    defaults={"output_dir": "distilled"},
)
BRIDGE = Command(
    "bridge",
    _USAGE,
    (
        "Train a student (--model_name_or_path) on a dataset to predict what --teacher_model_name_or_path does, a "
        "model of any architecture and tokenizer, both of which are saved with a tokenizer of their own; or, with "
        "--objective seqkd, on text that a teacher wrote."
    ),
    own=(BridgeOptions,),
    types=_bridge_types,
    defaults={"output_dir": "distilled"},
)


def distill(flags: list[str]) -> None:
    """Run `cbd-trl distill`.

    Args:
        flags: as typed.
    """
    script, args, model = _parse(DISTILL, flags)
    if not (args.teacher_model_name_or_path or args.teacher_cache or args.self_distillation):
        raise UsageError(
            "A teacher is missing: name one with --teacher_model_name_or_path, --teacher_cache or --self_distillation."
        )
    from cbd_trl.trainers.distill_trainer import DistillTrainer

    _train_student(DistillTrainer, script, args, model)


def bridge(flags: list[str]) -> None:
    """Run `cbd-trl bridge`.

    Args:
        flags: as typed.
    """
    script, args, model = _parse(BRIDGE, flags)
    if not args.black_box:
        require(teacher_model_name_or_path=args.teacher_model_name_or_path)
    from cbd_trl.trainers.bridge_trainer import BridgeDistillTrainer

    _train_student(BridgeDistillTrainer, script, args, model)


def _parse(command: Command, flags: list[str]) -> list[Any]:
    script, args, model = command.parse(flags)
    require(model_name_or_path=model.model_name_or_path, dataset_name=script.dataset_name)
    return [script, args, model]


def _train_student(kind: Any, script: Any, args: Any, model: Any) -> None:
    from trl import get_peft_config

    options = loading_options(model, args.model_init_kwargs)
    quantization = {name: options.pop(name) for name in ("quantization_config",) if name in options}
    args.model_init_kwargs = options
    trainer = kind(
        model=model.model_name_or_path,
        args=args,
        train_dataset=training_rows(script),
        eval_dataset=evaluation_rows(script, args),
        peft_config=get_peft_config(model),
        **quantization,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"The student is in {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
