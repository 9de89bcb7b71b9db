"""A teacher's predictions for a data set, on disk: written once, and read by trainings without a teacher in memory."""

from cbd_trl.cache.reader import MissingRowError, TeacherCache
from cbd_trl.cache.shards import CachedRow
from cbd_trl.cache.vllm import import_logprobs
from cbd_trl.cache.writer import write_cache

__all__ = ["CachedRow", "MissingRowError", "TeacherCache", "import_logprobs", "write_cache"]
