"""Half of a file, run twice by `test_generate.py` under torchrun."""

import sys
from pathlib import Path

import torch

from tests.generation.helpers import complete
from tests.processes import settle

if __name__ == "__main__":
    settle()
    folder = Path(sys.argv[1])
    complete(folder / "two.jsonl", str(folder / "teacher"), processing_class=None)
    torch.distributed.destroy_process_group()
