"""Configurations of the Hopper kernel that a device is to choose among: see tune.py.

The one that wins is HOPPER in kernels/hopper.py.
"""

from __future__ import annotations

from dataclasses import replace

from fused_siglip.kernels.hopper import HOPPER, HopperConfig
from fused_siglip.kernels.panel_triton import TritonPanel

_SHARED = HopperConfig((256, 128), stages=4, num_warps=8, shared=True, group_m=8)

CANDIDATES = {
    "turns": HopperConfig((128, 128), stages=6, num_warps=8),
    "turns_s5": HopperConfig((128, 128), stages=5, num_warps=8, store_buffers=4),
    "shared": _SHARED,
    "four": replace(_SHARED, consumers=4, num_warps=4),
    "wide": replace(_SHARED, tile=(128, 256), num_warps=4),
    "wide_group16": replace(_SHARED, tile=(128, 256), num_warps=4, group_m=16),
}
PORTABLE = "portable"  # the kernel of every other device


def panel_of(name: str) -> type[TritonPanel]:
    """The panel class with a candidate's kernel, whatever the panel's size."""
    fields = {"hopper": CANDIDATES.get(name, HOPPER), "hopper_tiles": 0}
    if name == PORTABLE:
        fields["hopper_tiles"] = float("inf")
    return type(name, (TritonPanel,), fields)
