"""What each subcommand of `cbd-trl` does: flags and YAML into a call of the library."""

import dataclasses
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from trl import ModelConfig, ScriptArguments, TrlParser

from cbd_trl.cli_arguments import (
    BuildArguments,
    DemoArguments,
    InitArguments,
    parse_anchors,
    parse_count,
    parse_shape,
)

_FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


class UsageError(ValueError):
    """The flags are wrong, as against what they ask for."""


class _Parser(TrlParser):
    """TrlParser with errors of one line: the stock usage text of a training command is 300 flags long."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.rstrip(".") + ".")

    def known_flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def _parse(
    name: str,
    description: str,
    types: list[Any],
    flags: list[str],
    positional: dict[str, str] | None = None,
    defaults: dict[str, Any] | None = None,
) -> list[Any]:
    """The dataclasses filled from flags and YAML, and the namespace of the positional arguments if there are any.

    Raises:
        UsageError: for unknown flags, values of the wrong type, or a config file that cannot be read.
    """
    parser = _Parser(
        types, prog=f"cbd-trl {name}", description=description, epilog="Flags can stand in a YAML file: --config FILE."
    )
    for argument, text in (positional or {}).items():
        parser.add_argument(argument, nargs="?", help=text)
    parser.set_defaults_with_config(**(defaults or {}))
    if "--config" in flags and flags.index("--config") == len(flags) - 1:
        raise UsageError("--config needs the path of a YAML file.")
    # TrlParser reads `--config FILE` only.
    flags = [part for flag in flags for part in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]
    try:
        *parsed, remaining = parser.parse_args_and_config(flags, return_remaining_strings=True)
    except OSError as error:
        raise UsageError(f"The config file cannot be read: {error}.") from error
    if remaining:
        _refuse_unknown(remaining, parser.known_flags())
    return parsed


def _refuse_unknown(remaining: list[str], known: list[str]) -> NoReturn:
    unknown = next((text for text in remaining if text.startswith("--")), remaining[0])
    near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.6)
    raise UsageError(f"There is no flag {unknown!r}.{f' Did you mean {near[0]}?' if near else ''}")


def _require(**values: Any) -> None:
    missing = [f"--{name}" for name, value in values.items() if value is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing.")


def load_rows(name: str, config: str | None = None, split: str = "train", streaming: bool = False) -> Any:
    """A dataset from a local file or from the Hub.

    Args:
        name: a .jsonl, .json, .csv, .parquet or .txt file (each also with .gz behind), or what `datasets.load_dataset`
            takes. A text file gives one row per line that is not blank.
        config: configuration of a dataset on the Hub.
        split: of a dataset on the Hub; a file has one split, which is all of it.
        streaming: read while training.

    Raises:
        ValueError: for a local file of another kind.
    """
    from datasets import load_dataset

    path = Path(name)
    if not path.is_file():
        return load_dataset(name, name=config, split=split, streaming=streaming)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    kind = _FILE_KINDS.get(suffix.lower())
    if kind is None:
        raise ValueError(
            f"{name} is not a dataset file that can be read: its name must end in {', '.join(_FILE_KINDS)}."
        )
    rows = load_dataset(kind, data_files=str(path), split="train", streaming=streaming)
    return rows.filter(lambda row: bool(row["text"].strip())) if kind == "text" else rows


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


def demo(flags: list[str]) -> None:
    """cbd-trl demo.

    Args:
        flags: as typed.
    """
    (arguments,) = _parse(
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
    arguments, script, args = _parse(
        "build", description, [BuildArguments, ScriptArguments, DistillConfig], flags, defaults={"output_dir": "chain"}
    )
    _require(source=arguments.source, dataset_name=script.dataset_name)
    anchors = [_with_own_run(anchor, args) for anchor in parse_anchors(arguments.anchors)]
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
        calibration_tokens=arguments.calibration_tokens,
        revision=arguments.source_revision,
    )
    for anchor in chain.anchors:
        print(f"{anchor.name}: {anchor.num_parameters:,} parameters, {anchor.shape}")
    print(
        f"The chain is in {args.output_dir}. A size from it: "
        f"cbd-trl init {args.output_dir} --num-parameters N --output DIR"
    )


def init(flags: list[str]) -> None:
    """cbd-trl init.

    Args:
        flags: as typed.
    """
    description = "Make a model of any size between the anchors of a chain, without a teacher and without training."
    positional = {"chain": "The chain: a folder that build wrote, or a Hub id. Required."}
    arguments, places = _parse("init", description, [InitArguments], flags, positional)
    if places.chain is None:
        raise UsageError("The chain is missing: cbd-trl init CHAIN --num-parameters N --output DIR.")
    _require(output=arguments.output)
    size = None if arguments.num_parameters is None else parse_count(arguments.num_parameters)
    from cbd_trl.chain.from_chain import from_chain

    rows = arguments.calibration_dataset
    model = from_chain(
        places.chain,
        size,
        config=parse_shape(arguments.shape),
        operator=arguments.operator,
        alpha=arguments.alpha,
        dtype=arguments.dtype,
        tolerance=arguments.tolerance,
        calibration_dataset=None if rows is None else load_rows(rows),
        revision=arguments.revision,
        save_directory=arguments.output,
    )
    made = model.config.cbd_trl
    print(f"{model.num_parameters():,} parameters, {made['shape']}: operator {made['operator']} of {made['anchors']}.")
    print(f"Written to {arguments.output}: AutoModelForCausalLM.from_pretrained({arguments.output!r}) loads it.")


def distill(flags: list[str]) -> None:
    """cbd-trl distill.

    Args:
        flags: as typed.
    """
    from cbd_trl.trainers.distill_config import DistillConfig

    description = (
        "Train a student (--model_name_or_path) on a dataset to predict what --teacher_model_name_or_path does."
    )
    script, args, model = _parse(
        "distill",
        description,
        [ScriptArguments, DistillConfig, ModelConfig],
        flags,
        defaults={"output_dir": "distilled"},
    )
    _require(
        model_name_or_path=model.model_name_or_path,
        teacher_model_name_or_path=args.teacher_model_name_or_path,
        dataset_name=script.dataset_name,
    )
    from trl import get_peft_config, get_quantization_config

    from cbd_trl.trainers.distill_trainer import DistillTrainer

    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    quantization = get_quantization_config(model)
    options: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
    trainer = DistillTrainer(
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


COMMANDS: dict[str, Callable[[list[str]], None]] = {"demo": demo, "build": build, "init": init, "distill": distill}
