"""The memory of a panel of the torch backend: buffers of the whole panel, and of a strip of it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .interface import PanelSpec, accumulate_dtype, ceil_div

# Pairs of a strip: 1 MiB in fp32.
_STRIP = 1 << 18


@functools.lru_cache(maxsize=512)  # steps of a training ask for the same again
def _layout(spec: PanelSpec) -> tuple[int, dict[str, tuple[int, torch.dtype]]]:
    """The rows of a strip, and the rows and dtype of every buffer. All have the panel's columns."""
    acc = accumulate_dtype(spec.dtype)
    whole = {"s": acc}  # which becomes dlogits where the dtypes agree
    if spec.store_dlogits and spec.dtype != acc:
        whole["dlogits"] = spec.dtype
    strip = {"terms": acc, "positive": torch.bool}
    if spec.scalar_grads:
        strip["z"] = acc  # beside s, for the sum of dlogits * s
    if spec.filters_negatives:
        strip |= {"bits": torch.int32, "dropped": torch.bool}
    if spec.weighted:
        strip |= {"alpha": acc, "beta": acc}
    # few strips, or what fits a core's cache
    strip_rows = min(spec.rows, max(_STRIP // max(spec.cols, 1), ceil_div(spec.rows, 16), 1))
    buffers = {name: (spec.rows, dtype) for name, dtype in whole.items()}
    buffers |= {name: (strip_rows, dtype) for name, dtype in strip.items()}
    if not spec.weighted:
        buffers["groups"] = (ceil_div(strip_rows, 2), acc)
    return strip_rows, buffers


def workspace_bytes(spec: PanelSpec) -> int:
    """Bytes of all buffers."""
    _, buffers = _layout(spec)
    return spec.cols * sum(rows * dtype.itemsize for rows, dtype in buffers.values())


class Workspace:
    """Buffers by name, made when they are first needed."""

    def __init__(self, spec: PanelSpec, device: torch.device):
        self.shape, self.device = (spec.rows, spec.cols), device
        self.strip_rows, self.layout = _layout(spec)
        self.buffers: dict[str, Tensor] = {}

    def view(self, name: str, m: int, n: int) -> Tensor:  # (m, n)
        """A buffer for m x n pairs. Panels at the edge are smaller, and contiguous too."""
        buffer = self.buffers.get(name)
        if buffer is None:
            rows, dtype = self.layout[name]
            buffer = torch.empty(rows, self.shape[1], dtype=dtype, device=self.device)
            self.buffers[name] = buffer
        if buffer.shape == (m, n):
            return buffer
        return buffer.view(-1)[: m * n].view(m, n)

    def scratch(self, m: int, n: int) -> Tensor:  # (m, n) int32
        """The memory of "terms", for as long as that is not written."""
        return self.view("terms", m, n).view(-1).view(torch.int32)[: m * n].view(m, n)
