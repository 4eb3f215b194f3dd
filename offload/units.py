"""Sizes in bytes, as people read them."""

GiB = 1 << 30


def size(nbytes: float) -> str:
    """Bytes for people: `1.2 GiB`, `3.4 MiB`."""
    for unit, scale in (("GiB", GiB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= scale / 10:
            digits = 1 if nbytes >= scale else 2
            return f"{nbytes / scale:.{digits}f} {unit}"
    return f"{nbytes:.0f} B"
