"""What to call a model in front of a reader."""

import os


def readable_name(name: str | None) -> str | None:
    """A Hub id as it is, the last folder of a local path, None for a model without a name."""
    if not name or name == "None":
        return None
    return os.path.basename(os.path.normpath(name)) if os.path.isabs(name) or os.path.isdir(name) else name
