"""Up to how many rows of x a 4-bit weight is decoded inside the product: one line a GPU.

More rows decode the weight first. `python -m benchmarks.tune` measures where the ways meet, and prints BORDER's line.
"""

BORDER: dict[str, int] = {}  # architecture, such as "sm_90" -> rows of x, as measured; nothing has been measured yet
SAFE = 32  # elsewhere: decoding first moves five times the bytes, so that few rows cannot lose by much
STEP = 64  # columns of W that the kernel takes at a time: rows of packed bytes then start at 32-byte sectors
LARGEST = 1 << 32  # values of a weight whose bytes a 31-bit offset can address


def border(architecture: str) -> int:
    """The most rows of x for which "sm_90" and the like decode inside the product."""
    return BORDER.get(architecture, SAFE)
