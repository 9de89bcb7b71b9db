"""How the steps of a guide are carried out: in this process, in the folder of the guide's reader."""

import argparse
import ast
import contextlib
import importlib
import io
import itertools
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import cbd_trl
from cbd_trl.cli.main import COMMANDS, main
from cbd_trl.recipe.schema import find_recipe, shipped_recipes
from tests.docs.reading import ROOT, Step
from tests.docs.world import INPUTS, VARIABLES, World, miniature

# Flags and arguments that name what a step makes.
_OUTPUTS = ("output_dir", "output_file", "output", "save_directory")
# Commands that take more than seconds: their flags are read, and what they would do is replaced.
NOT_RUN = {"demo": ("cbd_trl.demo.run.Demo", "tests/demo/test_demo.py")}


# Programs whose flags nobody here knows.
OTHER_PROJECTS = ("llama.cpp/",)


class _Read(Exception):
    """A program has read its flags."""


class Reader:
    """Who follows a guide from its beginning to its end.

    Args:
        folder: where they work; the current one.
        world: what they have besides.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        self.variables: dict[str, Any] = {name: getattr(cbd_trl, name) for name in cbd_trl.__all__}

    def follow(self, step: Step) -> None:
        """Do what a step says, at the scale of the tiny models.

        Args:
            step: of the guide.

        Raises:
            Exception: whatever comes of it, an `AssertionError` where a command fails.
        """
        text = miniature(step.text)
        if step.kind == "file":
            file = self.folder / step.name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        elif step.kind == "python":
            self._python(text)
        else:
            self._command(text)

    def _command(self, text: str) -> None:
        words = shlex.split(text, comments=True)
        while re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        assert words[0] in PROGRAMS, (
            f"nothing is known of the program {words[0]!r}: add how it is run or checked to PROGRAMS in {__name__}"
        )
        made = {word for flag, word in itertools.pairwise(words) if flag.lstrip("-") in _OUTPUTS}
        self._need(set(words) - made)
        for word in words:
            if file := _file_of(words, word):
                self._need(re.findall(r"[\w./-]+", file.read_text()))
        PROGRAMS[words[0]](words[1:])

    def _python(self, text: str) -> None:
        tree = ast.parse(text)
        constants = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        keywords = [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg in _OUTPUTS]
        self._need(constants - {node.value.value for node in keywords if isinstance(node.value, ast.Constant)})
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        for name in sorted((names - stored - self.variables.keys()) & VARIABLES.keys()):
            if name == "chain":
                self._need(["my-chain"])
            self.variables[name] = VARIABLES[name]()
        exec(compile(tree, "guide", "exec"), self.variables)

    def _need(self, words: Iterable[Any]) -> None:
        for name in INPUTS:
            if any(word == name or (isinstance(word, str) and word.startswith(f"{name}/")) for word in words):
                self.world.place(name, self.folder)


def _file_of(words: Sequence[str], word: str) -> Path | None:
    """The YAML that a word of a command names."""
    if word.endswith(".yaml") and Path(word).is_file():
        return Path(word)
    return find_recipe(word) if "build" in words and word in shipped_recipes() else None


def _cbd_trl(words: Sequence[str]) -> None:
    if not words or "..." in words:
        assert not words or words[0] in COMMANDS, f"there is no command {words[0]!r}"
        return
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(said))
        if words[0] in NOT_RUN:
            stack.enter_context(mock.patch(NOT_RUN[words[0]][0]))
        code = main(words)
    assert code == 0, f"exit code {code}: {said.getvalue().strip().splitlines()[-12:]}"


def _python(words: Sequence[str]) -> None:
    """A benchmark, or what executes the notebooks, reads its flags and goes no further; an example, or what writes a
    page, is there, and has a test of its own; what is written in another project is not looked at."""
    if words[0].startswith(OTHER_PROJECTS):
        return
    if words[:2] == ["-m", "cbd_trl.cli"]:
        _cbd_trl(words[2:])
        return
    module, flags = (words[1], words[2:]) if words[0] == "-m" else (words[0].replace("/", "."), words[1:])
    module = module.removesuffix(".py")
    if module.startswith(("examples.", "docs.")):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), f"there is no {module}"
        return
    if module == "pytest":
        files = [word for word in flags if word.endswith(".py")]
        assert files and all((ROOT / file).is_file() for file in files), (
            f"pytest runs files that are not there: {files}"
        )
        return
    if module == "tests.device.memory":
        assert set(flags) <= {"fast", "tuning", "held-out"}
        return
    assert module.startswith(("benchmarks.", "tests.examples.")), (
        f"nothing is known of python {module}: add it to _python in {__name__}"
    )
    # A script finds what lies beside it.
    with mock.patch.object(sys, "path", [str(ROOT / "benchmarks"), *sys.path]):
        _reads_its_flags(importlib.import_module(module).main, [module, *flags])


def _reads_its_flags(program: Callable[[], None], argv: list[str]) -> None:
    read = argparse.ArgumentParser.parse_known_args

    def parse_args(parser: argparse.ArgumentParser, *_: Any) -> None:
        _, unknown = read(parser, argv[1:])
        assert not unknown, f"{argv[0]} has no flags {unknown}"
        raise _Read

    def error(parser: argparse.ArgumentParser, message: str) -> None:
        # In prose a command stands with the flags that matter there.
        if not message.startswith("the following arguments are required"):
            raise AssertionError(f"{argv[0]}: {message}")

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args),
        mock.patch.object(argparse.ArgumentParser, "error", error),
        contextlib.suppress(_Read),
    ):
        program()
        raise AssertionError(f"{argv[0]} reads no flags")


def _accelerate(words: Sequence[str]) -> None:
    """The launcher's flags are read, and what it launches runs here, as one process."""
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch", f"nothing is known of accelerate {words[0]}"
    if not words[1:]:
        return
    options = launch_command_parser().parse_args(words[1:])
    assert options.config_file is None or Path(options.config_file).is_file(), (
        f"{options.config_file} is shown by no block of the guide: begin one with `# {options.config_file}`"
    )
    if options.config_file is not None:
        _reads_its_config(options)
    _python([*(["-m"] if options.module else []), options.training_script, *options.training_script_args])


def _reads_its_config(options: argparse.Namespace) -> None:
    """Every key of the launcher's file is one that accelerate knows."""
    from accelerate.commands.config.config_args import load_config_from_file

    config: Any = load_config_from_file(options.config_file)
    for section in ("fsdp_config", "deepspeed_config"):
        unknown = set(getattr(config, section)) - vars(options).keys()
        assert not unknown, f"{options.config_file}: {section} has no {sorted(unknown)}"


def _make(words: Sequence[str]) -> None:
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    unknown = [word for word in words if "=" not in word and word not in targets]
    assert not unknown, f"the Makefile has no target {unknown}"


def _pip(words: Sequence[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [extra for word in words for extra in re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*)\]", word)))]
    assert words[0] == "install" and set(asked) <= extras.keys(), f"pip {words}: the extras are {sorted(extras)}"


# A new program: how it is run, or checked, one line here.
PROGRAMS: dict[str, Callable[[Sequence[str]], None]] = {
    "cbd-trl": _cbd_trl,
    "python": _python,
    "accelerate": _accelerate,
    "make": _make,
    "pip": _pip,
}
