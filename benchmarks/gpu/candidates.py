"""Configurations of the Hopper kernel that tune.py compares on a device.

The one that wins is HOPPER in kernels/hopper.py.
"""

from __future__ import annotations

from dataclasses import replace

from fused_siglip.kernels.hopper import HOPPER
from fused_siglip.kernels.triton_panel import TritonPanel

CANDIDATES = {
    "shipped": HOPPER,
    "six_stages": replace(HOPPER, stages=6, store_buffers=2),
    "group_8": replace(HOPPER, group_m=8),
    "group_32": replace(HOPPER, group_m=32),
}
PORTABLE = "portable"  # the kernel of every other device


def panel_of(name: str) -> type[TritonPanel]:
    """The panel class with a candidate's kernel, whatever the panel's size."""
    fields = {"hopper": CANDIDATES.get(name, HOPPER), "hopper_tiles": 0}
    if name == PORTABLE:
        fields["hopper_tiles"] = float("inf")
    return type(name, (TritonPanel,), fields)
