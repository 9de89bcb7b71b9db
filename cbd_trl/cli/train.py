"""What each subcommand of `cbd-trl` does: flags and YAML into a call of the library."""

from collections.abc import Callable
from typing import Any

from trl import ModelConfig, ScriptArguments

from cbd_trl.cli.arguments import DemoArguments
from cbd_trl.cli.build import build
from cbd_trl.cli.cache import cache
from cbd_trl.cli.generate import generate
from cbd_trl.cli.init import init
from cbd_trl.cli.parsing import UsageError, evaluation_rows, parse_flags, require
from cbd_trl.cli.push import push
from cbd_trl.cli.report import report
from cbd_trl.utils.datasets import load_rows


def demo(flags: list[str]) -> None:
    """cbd-trl demo.

    Args:
        flags: as typed.
    """
    (arguments,) = parse_flags(
        "demo", "Distil a real 135M model into a chain and make six sizes from it.", [DemoArguments], flags
    )
    from cbd_trl.demo.run import Demo

    Demo(arguments.output, arguments.wheel, arguments.steps, arguments.seed).run()


def distill(flags: list[str]) -> None:
    """cbd-trl distill.

    Args:
        flags: as typed.
    """
    from cbd_trl.trainers.distill_config import DistillConfig

    description = (
        "Train a student (--model_name_or_path) on a dataset to predict what --teacher_model_name_or_path does, "
        "what --teacher_cache says it did, or what its own base does (--self_distillation with --use_peft)."
    )
    script, args, model = _student_flags("distill", description, DistillConfig, flags)
    if not (args.teacher_model_name_or_path or args.teacher_cache or args.self_distillation):
        raise UsageError(
            "A teacher is missing: name one with --teacher_model_name_or_path, --teacher_cache or --self_distillation."
        )
    from cbd_trl.trainers.distill_trainer import DistillTrainer

    _train_student(DistillTrainer, script, args, model)


def bridge(flags: list[str]) -> None:
    """cbd-trl bridge.

    Args:
        flags: as typed.
    """
    from cbd_trl.trainers.bridge_config import BridgeDistillConfig

    description = (
        "Train a student (--model_name_or_path) on a dataset to predict what --teacher_model_name_or_path does, a "
        "model of any architecture and tokenizer, both of which are saved with a tokenizer of their own; or, with "
        "--objective seqkd, on text that a teacher wrote."
    )
    script, args, model = _student_flags("bridge", description, BridgeDistillConfig, flags)
    if not args.black_box:
        require(teacher_model_name_or_path=args.teacher_model_name_or_path)
    from cbd_trl.trainers.bridge_trainer import BridgeDistillTrainer

    _train_student(BridgeDistillTrainer, script, args, model)


def _student_flags(command: str, description: str, config: type, flags: list[str]) -> list[Any]:
    types = [ScriptArguments, config, ModelConfig]
    script, args, model = parse_flags(command, description, types, flags, defaults={"output_dir": "distilled"})
    require(model_name_or_path=model.model_name_or_path, dataset_name=script.dataset_name)
    return [script, args, model]


def _train_student(kind: Any, script: Any, args: Any, model: Any) -> None:
    from trl import get_peft_config, get_quantization_config

    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    quantization = get_quantization_config(model)
    options: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
    trainer = kind(
        model=model.model_name_or_path,
        args=args,
        train_dataset=load_rows(
            script.dataset_name, script.dataset_config, script.dataset_train_split, script.dataset_streaming
        ),
        eval_dataset=evaluation_rows(script, args),
        peft_config=get_peft_config(model),
        **options,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"The student is in {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo,
    "build": build,
    "init": init,
    "push": push,
    "report": report,
    "cache": cache,
    "generate": generate,
    "distill": distill,
    "bridge": bridge,
}
