"""Numbers in readable units."""


def format_bytes(count: float) -> str:
    """A number of bytes in decimal units, such as 3.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_seconds(seconds: float) -> str:
    """A duration in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.2g} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def unit_prefix(number: float) -> tuple[str, float]:
    """Return the largest unit prefix that is not above ``number``, and its size."""
    sizes = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
    return max(
        ((name, size) for name, size in sizes.items() if size <= max(1.0, number)),
        key=lambda pair: pair[1],
    )
