"""siglip-kernel's own tests, with this package's loss in place of its kernels.

Its test files are read from its source distribution and run unchanged, on a CPU where there is no
GPU. The modules that they import are made here: each loss of theirs calls ours with its arguments
translated. Their references stay their own.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from unittest.mock import patch

import torch
from sources import fetched_tests
from torch import Tensor

from fused_siglip import SigLipLoss, siglip_loss

TESTS = fetched_tests("siglip-kernel")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAR = 1 << 20  # ids start here: a negative id would be padding
FILES = (
    "test_correctness.py",
    "test_distributed_logic.py",
    "test_gpu_kernels.py",
    "test_new_backends.py",
)
# What is left out, and why. A name that no longer exists is an error below.
LEFT_OUT = {
    "test_triton_kernel_loss": "a kernel that takes logits: no such function here",
    "test_triton_kernel_gradient": "a kernel that takes logits: no such function here",
    "test_triton_kernel_chunked_gradient": "a kernel that takes logits: no such function here",
    "test_numerical_stability_extreme_logits": "a kernel that takes logits: no such function here",
    "test_dtype_support": "a kernel that takes logits: no such function here",
    "test_fp8_requires_dim_multiple_16": "fp8 products: not offered here",
    "test_fp8_loss": "fp8 products: not offered here",
    "test_fp8_gradients": "fp8 products: not offered here",
    "test_chunked_bf16_fp8_parity": "fp8 products: not offered here",
    "test_chunked_epilogue_fp8_parity": "fp8 products: not offered here",
    # test_siglip_plus.py as a whole: it weights a positive by the number of its row's positives
}


def loss(
    images: Tensor,  # (M, D)
    texts: Tensor,  # (N, D)
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
    chunk_size: int = 0,
    diag_offset: int | None = 0,
    **_unused,  # which of their kernels, and how it is tuned
) -> Tensor:  # ()
    """Ours in the form of theirs: positives where column = row + diag_offset, or nowhere."""
    options = {}
    if diag_offset is None:
        options["negative_only"] = True
    elif diag_offset:
        options["image_ids"] = FAR + torch.arange(len(images), device=images.device)
        options["text_ids"] = FAR + torch.arange(len(texts), device=texts.device) - diag_offset
    if chunk_size:
        options["workspace_bytes"] = max(chunk_size * len(texts) * 4, 1 << 16)
    return siglip_loss(images, texts, log_scale.exp(), bias, **options)


def takes_logits(*_args, **_kwargs):
    raise NotImplementedError("a kernel of theirs that takes logits")


def module(name: str, **contents) -> ModuleType:
    made = ModuleType(f"siglip_kernel.{name}".rstrip("."))
    made.__dict__.update(contents)
    return made


def load(path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"their_{path.stem}", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def their_modules() -> dict[str, ModuleType]:
    package = module("", fused_siglip_loss=loss, __path__=[])
    made = [
        package,
        module("triton_sigmoid_bce", sigmoid_bce_forward=takes_logits),
        module("fused_linear_sigmoid_bce", fused_siglip_loss=loss),
        module("fused_siglip_kernel", fully_fused_siglip_loss=loss),
        module("fused_chunked_bf16", fused_chunked_bf16_siglip_loss=loss),
        module("hopper_kernel", hopper_fused_siglip_loss=loss),
        module("distributed", DistributedSigLIPLoss=lambda strategy: SigLipLoss()),
        module("gpu_config", get_gpu_arch=lambda: 80),
    ]
    reference = load(TESTS.parent / "siglip_kernel" / "reference.py")
    return {m.__name__: m for m in made} | {"siglip_kernel.reference": reference}


def their_tests() -> dict[str, Callable]:
    found, left_out = {}, set()
    for file in FILES:
        # read at import, and of no consequence: it says which of their kernels can run
        with patch.object(torch.cuda, "get_device_capability", lambda *_: (8, 0)):
            tests = load(TESTS / file)
        for name in ("DEVICE", "DEV"):
            if hasattr(tests, name):
                setattr(tests, name, DEVICE)
        for name, test in vars(tests).items():
            if not name.startswith("test_"):
                continue
            if name in LEFT_OUT:
                left_out.add(name)
            else:
                found[f"{file.removesuffix('.py')}__{name.removeprefix('test_')}"] = test
    assert left_out == set(LEFT_OUT), set(LEFT_OUT) - left_out
    return found


# for good: some of their tests import inside the function, and nothing else here has the package
sys.modules.update(their_modules())
globals().update(their_tests())
