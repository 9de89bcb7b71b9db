"""The inputs of tiny recipes, written once for all tests."""

from pathlib import Path

import pytest

from tests.recipe.helpers import write_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source and text, not to be written to."""
    folder = tmp_path_factory.mktemp("recipe")
    write_inputs(folder)
    return folder
