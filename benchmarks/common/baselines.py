"""The losses that are compared: each computes the same of (x, y, t, b)."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_siglip import Hardest, Random, siglip_loss
from fused_siglip.kernels import default_backend, why_triton_unavailable
from fused_siglip.testing import eager_siglip_loss

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

ROW_CHUNK = 512


class Baseline(NamedTuple):
    loss: Loss  # (x, y, t, b): (B, D), (B, D), (), () -> ()
    pair_matrices: int  # B x B it may hold at once on a CPU: to skip what cannot fit
    obstacle: Callable[[str], str | None]  # why it cannot run on a device type
    per_shape: bool = False  # compiles for every shape


def row_chunked_loss(x: Tensor, y: Tensor, t: Tensor, b: Tensor) -> Tensor:
    """Blocks of rows under autograd, as open_clip's main branch computes it given a chunk_size.

    The forward pass works on one block at a time; autograd still keeps every block for backward.
    """
    total = 0.0
    for start in range(0, x.shape[0], ROW_CHUNK):
        logits = t * x[start : start + ROW_CHUNK] @ y.T + b
        # softplus(-z) of a positive is softplus(z) - z
        total = total + F.softplus(logits).sum() - logits.diagonal(start).sum()
    return total / x.shape[0]


@functools.cache
def _compiled_eager() -> Loss:
    # past 8 shapes torch.compile would run the eager function instead, without a word
    torch._dynamo.config.recompile_limit = 128
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(eager_siglip_loss, dynamic=False)


def compiled_loss(x: Tensor, y: Tensor, t: Tensor, b: Tensor) -> Tensor:
    return _compiled_eager()(x, y, t, b)


@functools.cache
def open_clip_loss_module() -> ModuleType:
    # its loss module alone: that needs only torch, the whole package torchvision and more
    package = importlib.util.find_spec("open_clip")
    path = Path(package.origin).with_name("loss.py")
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_clip_loss(x: Tensor, y: Tensor, t: Tensor, b: Tensor) -> Tensor:
    return open_clip_loss_module().SigLipLoss()(x, y, t, b)


def masked_loss(
    x: Tensor, y: Tensor, t: Tensor, b: Tensor, *, negatives: Random | Hardest
) -> Tensor:
    """What one writes without ``negatives=``: the eager loss and a B x B mask of kept pairs."""
    size = x.shape[0]
    if isinstance(negatives, Random):
        kept = torch.rand(size, size, device=x.device) < negatives.keep
    else:
        with torch.no_grad():
            similarities = (x @ y.T).fill_diagonal_(-torch.inf)
            wanted = max(round(negatives.keep * (size - 1)), 1)
            last = similarities.sort(dim=1, descending=True).values[:, wanted - 1, None]
            kept = similarities >= last
    return eager_siglip_loss(x, y, t, b, kept=kept)


def siglip_kernel_loss(x: Tensor, y: Tensor, t: Tensor, b: Tensor) -> Tensor:
    from siglip_kernel import fused_siglip_loss

    return fused_siglip_loss(x, y, t.log(), b)  # it takes the logarithm of the scale


def _runs(device_type: str) -> None:
    return None


def _no_compiler(device_type: str) -> str | None:
    if device_type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        return "torch.compile finds no C++ compiler"
    return None


def _no_triton(device_type: str) -> str | None:
    # its interpreter computes the right values, but a time of it means nothing
    return (
        why_triton_unavailable(device_type, torch.float32)
        if device_type == "cuda"
        else "needs a GPU"
    )


def _not_installed(package: str, device_types: tuple[str, ...]) -> Callable[[str], str | None]:
    def obstacle(device_type: str) -> str | None:
        if device_type not in device_types:
            return f"needs {' or '.join(device_types)}"
        return None if importlib.util.find_spec(package) else "not installed"

    return obstacle


def _panel_variant(name: str) -> Loss:
    def loss(x: Tensor, y: Tensor, t: Tensor, b: Tensor) -> Tensor:
        from ..gpu.ablation_panels import variant_loss  # which imports triton

        return variant_loss(x, y, t, b, backend=name)

    return loss


BASELINES = {
    "fused_triton": Baseline(functools.partial(siglip_loss, backend="triton"), 0, _no_triton),
    "fused_torch": Baseline(functools.partial(siglip_loss, backend="torch"), 0, _runs),
    "eager": Baseline(eager_siglip_loss, 7, _runs),
    "compiled": Baseline(compiled_loss, 3, _no_compiler, per_shape=True),
    "row_chunked": Baseline(row_chunked_loss, 4, _runs),
    "open_clip": Baseline(open_clip_loss, 7, _not_installed("open_clip", ("cpu", "cuda"))),
    "siglip_kernel": Baseline(siglip_kernel_loss, 0, _not_installed("siglip_kernel", ("cuda",))),
}
# The same sweep over other panels, to compare with what is shipped: see alternative.py.
ABLATIONS = {
    name: Baseline(_panel_variant(name), 0, _no_triton)
    for name in ("library_fp32", "library_in_place", "portable")
}
LOSSES = BASELINES | ABLATIONS


def obstacles(device: str) -> dict[str, str | None]:
    """For every baseline, why it cannot run on this device, or None where it can."""
    return {name: c.obstacle(torch.device(device).type) for name, c in BASELINES.items()}


def default_fused(device: str) -> str:
    """The fused loss that a user gets who names no backend."""
    return f"fused_{default_backend(device, torch.float32)}"
