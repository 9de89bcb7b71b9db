"""The teacher's cache of a benchmark: the one place that knows how a cache is written."""

from pathlib import Path

from datasets import Dataset
from trl import SFTConfig

from benchmarks.workload import Workload, trainer_settings
from cbd_trl.cache import write_cache

TOP_K = 64


def ensure_cache(workload: Workload, rows: Dataset, folder: Path, kind: str = "top_k") -> float:
    """Write the teacher's outputs for these rows; those that the folder holds are not computed again.

    Args:
        workload: of the run.
        rows: with the column input_ids.
        folder: of the cache.
        kind: `top_k` (64), `sampled` (64 draws) or `hidden`.

    Returns:
        bytes on disk per token.
    """
    arguments = SFTConfig(**trainer_settings(workload, 1, 1, 1))
    how = {"processing_class": workload.tokenizer(), "args": arguments, "kind": kind, "k": TOP_K}
    write_cache(workload.load_teacher(), rows, folder, **how)
    tokens = sum(len(row) for row in rows["input_ids"])
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / tokens
