"""The notebooks of examples/, executed. To execute them anew in place, pictures included, after a change:

python -m tests.examples.notebooks

python -m tests.examples.notebooks --repository https://github.com/me/cbd_trl   # and point them there
"""

import argparse
import os
import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# Of the cell that installs the package where it is not: skipped here.
INSTALL = "install"


def read(path: Path) -> NotebookNode:
    """A notebook from its file.

    Args:
        path: of the file.
    """
    return nbformat.read(path, as_version=4)


def is_install(cell: NotebookNode) -> bool:
    """Whether a cell installs the package."""
    return INSTALL in cell.metadata.get("tags", ())


def execute(notebook: NotebookNode, folder: Path, timeout: float = 600) -> NotebookNode:
    """Run a notebook's cells in a kernel of their own, without a network and with one thread.

    Args:
        notebook: is left as it was.
        folder: where its cells run and write.
        timeout: seconds for one cell.

    Returns:
        the notebook with its new outputs; the cell that installs is as it was. What is written to stderr, bars of
        progress above all, is left out.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    cells = [cell for cell in notebook.cells if not is_install(cell)]
    run = nbformat.from_dict({**notebook, "cells": cells})
    offline = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(folder / ".ipython"),
    }
    client = NotebookClient(
        run, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}}, record_timing=False
    )
    client.execute(env={**os.environ, **offline})
    for cell in run.cells:
        if cell.cell_type == "code":
            cell.outputs = _tidy(cell.outputs)
    done = {cell.id: cell for cell in run.cells}
    return nbformat.from_dict({**notebook, "cells": [done.get(cell.id, cell) for cell in notebook.cells]})


def _tidy(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Without stderr; what was printed in one go stands together."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stdout" and kept and kept[-1].get("name") == "stdout":
            kept[-1].text += output.text
        elif output.get("name") != "stderr":
            kept.append(output)
    return kept


def pictures(notebook: NotebookNode) -> dict[str, list[str]]:
    """The PNGs of a notebook, base64, by the cell that drew them."""
    found = {
        cell.id: [
            output.data["image/png"] for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
        ]
        for cell in notebook.cells
    }
    return {cell: images for cell, images in found.items() if images}


def point_to(text: str, repository: str) -> str:
    """A notebook's text with its badge and its installation pointing to a repository.

    Args:
        text: of the file.
        repository: its address, https://github.com/OWNER/NAME.
    """
    name = repository.removeprefix("https://github.com/").rstrip("/")
    text = re.sub(r"(colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+", rf"\g<1>{name}", text)
    return re.sub(r"(https://github\.com/)[\w.-]+/[\w.-]+", rf"\g<1>{name}", text)


def main() -> None:
    """Execute the notebooks in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", help="https://github.com/OWNER/NAME: where badge and installation lead")
    repository = parser.parse_args().repository
    for path in NOTEBOOKS:
        if repository:
            path.write_text(point_to(path.read_text(), repository))
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(execute(read(path), Path(folder)), path)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
