"""The teacher's cache of a benchmark: the one place that knows how a cache is written."""

from pathlib import Path

from datasets import Dataset
from trl import SFTConfig

from benchmarks.workload import Workload, trainer_settings

TOP_K = 64


def ensure_cache(workload: Workload, rows: Dataset, folder: Path) -> float:
    """Write the teacher's top-64 of these rows; those that the folder holds are not computed again.

    Args:
        workload: of the run.
        rows: with the column input_ids.
        folder: of the cache.

    Returns:
        bytes on disk per token.
    """
    # Imported here because the contestants without a cache do not need it.
    from cbd_trl.cache import write_cache

    arguments = SFTConfig(**trainer_settings(workload, 1, 1, 1))
    write_cache(workload.load_teacher(), rows, folder, processing_class=workload.tokenizer(), args=arguments, k=TOP_K)
    tokens = sum(len(row) for row in rows["input_ids"])
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / tokens
