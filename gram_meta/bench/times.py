"""Durations as text."""


def in_words(seconds: float) -> str:
    """Return seconds as text: "40 s", "7 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
