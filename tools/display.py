"""Numbers as people read them, and colours."""

from __future__ import annotations

__all__ = ["PALETTE", "counted", "nbytes", "seconds"]

# The colours of M. Okabe and K. Ito, "Color Universal Design" (2008), without black, and a light green. They differ for
# people with any kind of colour blindness, and are light enough for a black label. The last one, grey, is for the rest.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#f0e442", "#56b4e9", "#d55e00", "#cc79a7", "#94c973", "#969ba3")


def nbytes(value: float) -> str:
    """Bytes in a unit that fits: 64 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1023.95:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:,.4g} TiB"


def seconds(value: float) -> str:
    """Seconds in a unit that fits: 1.5 ms."""
    for least, factor, unit in ((7200, 3600, "h"), (300, 60, "min"), (1, 1, "s"), (1e-3, 1e-3, "ms")):
        if value >= least:
            return f"{value / factor:.4g} {unit}"
    return f"{value * 1e6:.4g} \u00b5s" if value else "0"


def counted(number: float, noun: str) -> str:
    """A number with its noun: 1 block, 1,024 blocks."""
    return f"{number:,.0f} {noun}{'' if number == 1 else 's'}"
