"""Where the tests run: on a GPU, or on the CPU with Triton's interpreter or without."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()
