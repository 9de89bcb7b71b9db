"""How long something takes, in front of a reader."""


def format_seconds(seconds: float) -> str:
    """Seconds as people say them: `40 s`, `6 min`, `1 h 5 min`, `3 d 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
