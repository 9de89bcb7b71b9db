"""Text that a teacher wrote: generated here (`generate_completions`), or by a server (`read_completions`)."""

from cbd_trl.generation.decoding import DecodingConfig
from cbd_trl.generation.files import read_completions
from cbd_trl.generation.generate import Corpus, generate_completions

__all__ = ["Corpus", "DecodingConfig", "generate_completions", "read_completions"]
