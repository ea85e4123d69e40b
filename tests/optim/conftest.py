"""What tests of kernels run under, and the modules beside the tests (optim_tools, simulated_device)."""

import importlib.util
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

_file = Path(__file__).parents[1] / "kernels" / "conftest.py"
_specification = importlib.util.spec_from_file_location("kernels_conftest", _file)
assert _specification and _specification.loader
_kernels = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(_kernels)
aot, costs, guards = _kernels.aot, _kernels.costs, _kernels.guards
interpreter_mended = _kernels.interpreter_mended
