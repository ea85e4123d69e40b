"""Speed, memory and quality against peers, in one run. Run as `python -m benchmarks.NAME` from the checkout.

`python -m` puts the checkout first on `sys.path`, where a peer's `import kernels` or `import data` would find ours.
So the checkout leaves the path here, before any benchmark imports a peer; the benchmarks themselves are still found,
through this package, and fourbit through its installation.
"""

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


def leave_checkout() -> None:
    """Take every spelling of the checkout (absolute, relative, empty for the current folder) off `sys.path`."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != CHECKOUT]


leave_checkout()
