"""Up to how many rows of x a 4-bit weight is decoded inside the product: one line a GPU.

More rows decode the weight first. `python -m benchmarks.tune` measures where the ways meet, and prints BORDER's line.
A line is one model's: an H200 reads memory half as fast again as an H100, whose architecture it has.
"""

# Model ("NVIDIA H200"), or architecture ("sm_90") for those of its models without a line -> rows of x, as measured.
BORDER: dict[str, int] = {}  # nothing has been measured yet
SAFE = 32  # elsewhere: decoding first moves five times the bytes, so that few rows cannot lose by much
STEP = 64  # columns of W that the kernel takes at a time: rows of packed bytes then start at 32-byte sectors
LARGEST = 1 << 32  # values of a weight whose bytes a 31-bit offset can address


def border(model: str, architecture: str) -> int:
    """The most rows for which a GPU of this model and architecture decodes inside the product."""
    return BORDER.get(model, BORDER.get(architecture, SAFE))
