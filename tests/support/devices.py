"""Where the tests run: on a GPU, or on the CPU with Triton's interpreter or without."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()


def require_triton_kernels() -> None:
    """Skips a whole file of tests where the Triton kernels can neither run nor be interpreted."""
    pytest.importorskip("triton")
    if not (HAS_GPU or INTERPRETED):
        pytest.skip(
            "the Triton kernels need a GPU or TRITON_INTERPRET=1 in the environment",
            allow_module_level=True,
        )
