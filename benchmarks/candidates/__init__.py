"""Panel kernels that a device is to choose among: bf16, positives on the diagonal.

Each is a :class:`fused_siglip.kernels.Panel`. The one that wins moves into kernels/, the others go.
``python -m benchmarks.tune`` compiles, checks and times them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_siglip.kernels import Panel, Positives
from fused_siglip.kernels.panel_triton import TritonPanel


@dataclass(frozen=True)
class Gluon:
    """How the warp-specialised kernel is compiled: see gluon_panel.py."""

    tile: tuple[int, int]
    stages: int
    width: int = 32  # columns of a round of the epilogue
    consumers: int = 2
    shared: bool = True  # the consumers work on one tile; else they take turns
    hold: bool = False  # the second consumer starts one step later
    store_buffers: int = 0  # through shared memory and the copy engine; 0: from registers
    block_k: int = 64
    group_m: int = 8
    num_warps: int = 4  # of a consumer
    mode: str = "all"  # "bare": product and store alone; "loads": copies alone

    @property
    def registers(self) -> int:
        """A thread of a consumer: what 65,536 allow beside the other consumers and the producer."""
        return 240 if self.num_warps * self.consumers == 8 else 112

    @property
    def rows(self) -> int:  # of a consumer
        return self.tile[0] // self.consumers if self.shared else self.tile[0]


_TURNS = Gluon((128, 128), stages=6, shared=False, num_warps=8, store_buffers=2, group_m=16)
_SHARED = Gluon((256, 128), stages=4, num_warps=8, store_buffers=2)

CANDIDATES: dict[str, Gluon] = {
    "gluon_turns": _TURNS,
    "gluon_turns_direct": replace(_TURNS, store_buffers=0),
    "gluon_shared": _SHARED,
    "gluon_four": replace(_SHARED, consumers=4, num_warps=4),
    "gluon_wide": Gluon((128, 256), stages=4, store_buffers=2),
}
# What is left out shows where the time goes. Not right, and only timed.
ABLATIONS: dict[str, Gluon] = {
    "gluon_turns_bare": replace(_TURNS, mode="bare"),
    "gluon_turns_loads": replace(_TURNS, mode="loads"),
}


class _Candidate(TritonPanel):
    """The shipped panel with another kernel."""

    config_of: Gluon
    slots = 1  # of partial sums, a tile

    def __init__(self, rows: int, cols: int, dtype: torch.dtype, device: torch.device, *rest):
        super().__init__(rows, cols, dtype, device, *rest)
        if self.slots > 1:
            self.partials = self.partials.new_empty(self.slots * self.partials.numel())
        properties = torch.cuda.get_device_properties(device)
        self.programs = properties.multi_processor_count

    def __call__(
        self,
        x: Tensor,  # (m, D)
        y: Tensor,  # (n, D)
        logit_scale: Tensor,  # ()
        logit_bias: Tensor,  # ()
        positives: Positives,
        sums: Tensor,  # (3,)
        kept: None = None,
    ) -> Tensor:  # (m, n)
        (m, _), n = x.shape, y.shape[0]
        tiles_m, tiles_n = self._tiles(m, n)
        tiles = tiles_m * tiles_n
        partials = self.partials[: 3 * self.slots * tiles].view(3, -1)
        diagonal = n if positives.diagonal is None else positives.diagonal
        scalars = (logit_scale, logit_bias, m, n, diagonal)
        self.launch(tiles, x, y, partials, scalars)
        torch.sum(partials, 1, out=sums)
        return self.g[:m, :n]

    def launch(self, tiles: int, x: Tensor, y: Tensor, partials: Tensor, scalars: tuple) -> None:
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        from .gluon_panel import panel_ws_kernel

        config = self.config_of

        def descriptor(t: Tensor, *block: int) -> TensorDescriptor:
            layout = gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)
            return TensorDescriptor.from_tensor(t, list(block), layout)

        (block_m, block_n), block_k = config.tile, config.block_k
        staged = config.store_buffers > 0
        panel_ws_kernel[(min(self.programs, tiles),)](
            descriptor(x, block_m, block_k),
            descriptor(y, block_n, block_k),
            None if staged else self.g,
            descriptor(self.g, config.rows, config.width) if staged else None,
            partials,
            *scalars,
            self.g.stride(0),
            D=x.shape[1],
            GROUP_M=config.group_m,
            STAGES=config.stages,
            WIDTH=config.width,
            GRAD_SCALE=self.grad_scale,
            SCALAR_GRADS=True,
            SHARED=config.shared,
            CONSUMERS=config.consumers,
            HOLD=config.hold,
            STORE_BUFFERS=config.store_buffers,
            MODE=config.mode,
            REGISTERS=config.registers,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )


def panel_of(name: str) -> type[Panel]:
    """The panel class of a candidate or an ablation."""
    config = (CANDIDATES | ABLATIONS)[name]
    slots = config.consumers if config.shared else 1
    return type(name, (_Candidate,), {"tile": config.tile, "config_of": config, "slots": slots})
