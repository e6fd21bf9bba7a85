"""The module that writes the Kernel Hub's layout, which is no part of any package."""

import importlib.util
from pathlib import Path

_FILE = Path(__file__).resolve().parents[2] / ".ci/kernel_hub/layout.py"
_SPEC = importlib.util.spec_from_file_location("kernel_hub_layout", _FILE)
layout = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(layout)
