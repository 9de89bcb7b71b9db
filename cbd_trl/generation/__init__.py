"""Text that a teacher wrote: generated here (`generate_completions`), or by a server (`read_completions`).

The names load on first use, because `cbd-trl generate --help` imports `decoding` and must not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cbd_trl.generation.decoding import DecodingConfig
    from cbd_trl.generation.files import read_completions
    from cbd_trl.generation.generate import Corpus, generate_completions

__all__ = ["Corpus", "DecodingConfig", "generate_completions", "read_completions"]


def __getattr__(name: str) -> object:
    if name in __all__:
        for module in ("decoding", "files", "generate"):
            found = import_module(f"{__name__}.{module}")
            if name in vars(found):
                return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}: it exports {', '.join(__all__)}.")
