"""The command `cbd-trl`: picks the subcommand, and turns its errors into one line and an exit code."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from cbd_trl.cli.parsing import UsageError
from cbd_trl.utils.formatting import did_you_mean

COMMANDS = {
    "demo": "distill a real 135M model into a chain, make six other sizes from it, measure and draw them",
    "build": "distill a chain of anchors from a source model",
    "consolidate": "train the anchors of a chain together for the sizes between them",
    "init": "make models of any size from a chain",
    "push": "upload a chain to the Hub",
    "report": "measure a chain and the sizes between its anchors: a page, a picture, a JSON file",
    "cache": "write what a teacher predicts for a dataset to disk, to train without the teacher",
    "generate": "have a teacher write completions of prompts, to train on",
    "distill": "train a student on a dataset to predict what a teacher predicts",
    "bridge": "the same with a teacher of another tokenizer",
}
# Commands that share a module, by the module; any other has one of its own name.
_MODULES = {"distill": "train", "bridge": "train"}
USAGE = f"usage: cbd-trl {{{','.join(COMMANDS)}}} [flags]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments behind the program's name; None for those of the process.

    Returns:
        the exit code: 0 when all went well, 1 when the command failed, 2 for wrong flags, 130 when it was interrupted.

    Raises:
        SystemExit: with code 0, once the help of a subcommand is printed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from cbd_trl import __version__

        print(f"cbd-trl {__version__}")
        return 0
    name, *flags = arguments
    if name not in COMMANDS:
        print(_unknown(name), file=sys.stderr)
        return 2
    return _run(name, flags)


def _run(name: str, flags: list[str]) -> int:
    # Where it is installed it warns of kernels for 4-bit weights on a CPU, whatever the command.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # TRL's configs set the old name; transformers warns about it on every config, the user can do nothing.
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    command = getattr(import_module(f"cbd_trl.cli.{_MODULES.get(name, name)}"), name)
    try:
        command(flags)
    except UsageError as error:
        print(f"cbd-trl {name}: {error} See cbd-trl {name} --help.", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        # Our errors name a way out in one sentence; a traceback would bury it.
        if os.environ.get("CBD_TRL_TRACEBACK"):
            raise
        from cbd_trl.recipe.schema import RecipeError

        # The problems of a recipe are a list, a line each.
        text = str(error) if isinstance(error, RecipeError) else " ".join(str(error).split())
        print(f"cbd-trl {name}: error: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ncbd-trl {name}: interrupted; what was finished is kept, the same command goes on.", file=sys.stderr)
        return 130
    return 0


def _help() -> str:
    lines = [
        USAGE,
        "",
        "Chain-based distillation: distill a language model once, make models of any size in seconds.",
        "",
    ]
    lines += [f"  {name:<13}{text}" for name, text in COMMANDS.items()]
    lines += [
        "",
        "A whole chain as one file: cbd-trl build recipe.yaml --dry-run. cbd-trl build --list-recipes names some.",
        "Elsewhere flags can stand in a YAML file: cbd-trl distill --config distill.yaml. Flags win over the file.",
        "cbd-trl COMMAND --help lists the options of a command, --help-all those of TRL too.",
        "CBD_TRL_TRACEBACK=1 shows where an error came from.",
        "Several devices: accelerate launch -m cbd_trl.cli build ...",
    ]
    return "\n".join(lines)


def _unknown(name: str) -> str:
    return f"cbd-trl: there is no command {name!r}.{did_you_mean(name, COMMANDS)} There are: {', '.join(COMMANDS)}."


if __name__ == "__main__":
    sys.exit(main())
