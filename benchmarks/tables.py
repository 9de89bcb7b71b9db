"""Markdown tables of the benchmarks."""

import platform
from collections.abc import Sequence
from importlib.metadata import version

import torch

from cbd_trl.utils.formatting import markdown_table


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers.

    Args:
        header: titles.
        lines: cells.
    """
    return markdown_table(header, lines, ["left", *["right"] * (len(header) - 1)]) + "\n"


def machine(threads: int) -> str:
    """One line on what the numbers were measured with.

    Args:
        threads: of torch.
    """
    return f"{processor()}, {threads} threads, {torch.get_default_dtype()}; {packages()}\n"


def packages() -> str:
    """The versions that numbers were measured with."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))


def processor() -> str:
    """Name of the CPU."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def gigabytes(count: float) -> str:
    """Bytes as 10^9."""
    return f"{count / 1e9:.2f}"
