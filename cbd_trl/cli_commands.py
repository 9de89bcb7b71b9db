"""What each subcommand of `cbd-trl` does: flags and YAML into a call of the library."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl import ModelConfig, ScriptArguments

from cbd_trl.cli_arguments import BuildArguments, DemoArguments
from cbd_trl.cli_cache import cache
from cbd_trl.cli_generate import generate
from cbd_trl.cli_init import init
from cbd_trl.cli_parsing import UsageError, load_rows, parse_flags, require
from cbd_trl.cli_push import push
from cbd_trl.cli_report import report
from cbd_trl.cli_values import parse_anchors, parse_bridge


def _evaluation_rows(script: ScriptArguments, args: Any) -> Any:
    if args.eval_strategy == "no":
        return None
    assert script.dataset_name is not None
    if Path(script.dataset_name).is_file():
        raise ValueError(
            f"--eval_strategy {args.eval_strategy}: {script.dataset_name} is a file, without a split to evaluate on. "
            "Use a dataset with splits, or --eval_strategy no."
        )
    return load_rows(script.dataset_name, script.dataset_config, script.dataset_test_split, script.dataset_streaming)


def _with_own_run(anchor: dict[str, Any] | float, args: Any) -> dict[str, Any] | float:
    """An anchor whose own `args` (training arguments that differ) and `dataset` (a file or Hub id) are made real."""
    if not isinstance(anchor, dict):
        return anchor
    own = dict(anchor)
    if isinstance(changes := own.get("args"), dict):
        unknown = changes.keys() - {field.name for field in dataclasses.fields(args)}
        if unknown:
            raise ValueError(f"--anchors: args of {anchor}: {sorted(unknown)} are no fields of DistillConfig.")
        own["args"] = dataclasses.replace(args, **changes)
    if isinstance(own.get("dataset"), str):
        own["dataset"] = load_rows(own["dataset"])
    return own


def _bridge_step(value: str | dict[str, Any] | None, args: Any) -> Any:
    """The bridge of `--bridge`, which is trained as the anchors are but for its own `args`."""
    own = parse_bridge(value)
    if own is None:
        return None
    from trl import SFTConfig

    from cbd_trl.chain.bridge_step import BridgeStep
    from cbd_trl.trainers.bridge_config import BridgeDistillConfig

    changes = own.get("args") or {}
    if unknown := changes.keys() - {field.name for field in dataclasses.fields(BridgeDistillConfig)}:
        raise ValueError(f"--bridge: {sorted(unknown)} in args are no fields of BridgeDistillConfig.")
    # The source's way of being loaded is not the student's, nor is what compares models of one tokenizer.
    names = {field.name for field in dataclasses.fields(SFTConfig) if field.init} - {"model_init_kwargs"}
    config = BridgeDistillConfig(**{**{name: getattr(args, name) for name in names}, **changes})
    dataset = None if own.get("dataset") is None else load_rows(own["dataset"])
    return BridgeStep(own["model"], args=config, dataset=dataset)


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


def build(flags: list[str]) -> None:
    """cbd-trl build.

    Args:
        flags: as typed.
    """
    from cbd_trl.trainers.distill_config import DistillConfig

    description = (
        "Distil a chain of anchors from a source model. --output_dir is the chain's folder; run again with the same "
        "flags, the command goes on where it was interrupted."
    )
    arguments, script, args = parse_flags(
        "build", description, [BuildArguments, ScriptArguments, DistillConfig], flags, defaults={"output_dir": "chain"}
    )
    require(source=arguments.source, dataset_name=script.dataset_name)
    anchors = [_with_own_run(anchor, args) for anchor in parse_anchors(arguments.anchors)]
    bridge_step = _bridge_step(arguments.bridge, args)
    from cbd_trl.chain.build import build_chain

    chain = build_chain(
        arguments.source,
        anchors,
        dataset=load_rows(
            script.dataset_name, script.dataset_config, script.dataset_train_split, script.dataset_streaming
        ),
        eval_dataset=_evaluation_rows(script, args),
        output_dir=args.output_dir,
        args=args,
        bridge=bridge_step,
        calibration_tokens=arguments.calibration_tokens,
        revision=arguments.source_revision,
    )
    for anchor in chain.anchors:
        print(f"{anchor.name}: {anchor.num_parameters:,} parameters, {anchor.shape}")
    print(
        f"The chain is in {args.output_dir}. A size from it: "
        f"cbd-trl init {args.output_dir} --num-parameters N --output DIR"
    )


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
        eval_dataset=_evaluation_rows(script, args),
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
