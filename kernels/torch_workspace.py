"""The memory of a panel of the torch backend: buffers of the whole panel, and of a strip of it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .interface import PanelSpec, accumulate_dtype

# Pairs of a strip: 1 MiB in fp32.
_STRIP = 1 << 18


@functools.cache
def _buffers(spec: PanelSpec) -> tuple[dict[str, torch.dtype], dict[str, torch.dtype]]:
    """The dtypes of the buffers for a whole panel, and for a strip."""
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
    return whole, strip


def _strip_rows(rows: int, cols: int) -> int:
    """Rows of a panel that are taken at one time: few strips, or what fits a core's cache."""
    return min(rows, max(_STRIP // max(cols, 1), -(-rows // 16), 1))


def _kind(spec: PanelSpec) -> PanelSpec:
    """A spec without sizes."""
    return spec._replace(rows=0, cols=0, wide=False, losses=True)


def workspace_bytes(spec: PanelSpec) -> int:
    """Bytes of all buffers."""
    whole, strip = (sum(d.itemsize for d in buffers.values()) for buffers in _buffers(_kind(spec)))
    return spec.cols * (spec.rows * whole + _strip_rows(spec.rows, spec.cols) * strip)


class Workspace:
    """Buffers by name, made when they are first needed."""

    def __init__(self, spec: PanelSpec, device: torch.device):
        self.shape, self.device = (spec.rows, spec.cols), device
        self.strip_rows = _strip_rows(*self.shape)
        self.whole, self.strip = _buffers(_kind(spec))
        self.buffers: dict[str, Tensor] = {}

    def view(self, name: str, m: int, n: int) -> Tensor:  # (m, n)
        """A buffer for m x n pairs. Panels at the edge are smaller, and contiguous too."""
        buffer = self.buffers.get(name)
        if buffer is None:
            rows, cols = self.shape
            if name in self.strip:
                rows, dtype = self.strip_rows, self.strip[name]
            else:
                dtype = self.whole[name]
            buffer = torch.empty(rows, cols, dtype=dtype, device=self.device)
            self.buffers[name] = buffer
        if buffer.shape == (m, n):
            return buffer
        return buffer.view(-1)[: m * n].view(m, n)

    def scratch(self, m: int, n: int) -> Tensor:  # (m, n) int32
        """The memory of "terms", for as long as that is not written."""
        return self.view("terms", m, n).view(-1).view(torch.int32)[: m * n].view(m, n)
