"""Panel kernels that a device is to choose among: bf16, positives on the diagonal.

Each is a :class:`fused_siglip.kernels.Panel`. The one that wins moves into kernels/, the others go.
``python -m benchmarks.tune`` compiles, checks and times them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_siglip.kernels import Panel, Positives
from fused_siglip.kernels.configs import PanelConfig
from fused_siglip.kernels.panel_triton import TritonPanel


@dataclass(frozen=True)
class Gluon:
    """How the warp-specialised kernel is compiled: see gluon_panel.py."""

    tile: tuple[int, int]
    stages: int
    parts: int
    shared: bool = True  # both consumers on one tile; else they take turns
    hold: bool = False  # the second consumer starts one step later
    store_buffers: int = 0  # through shared memory and the copy engine; 0: from registers
    block_k: int = 64
    group_m: int = 8
    num_warps: int = 4  # of a consumer
    mode: str = "all"  # "bare": product and store alone; "loads": copies alone

    @property
    def registers(self) -> int:
        """A thread of a consumer: what 65,536 allow beside the other consumer and the producer."""
        return 240 if self.num_warps == 4 else 112

    @property
    def rows(self) -> int:  # of a consumer
        return self.tile[0] // 2 if self.shared else self.tile[0]


@dataclass(frozen=True)
class Tma:
    """How the kernel with tensor descriptors is compiled: see tma_panel.py."""

    config: PanelConfig
    persistent: bool

    @property
    def tile(self) -> tuple[int, int]:
        return self.config.tile


_W128 = PanelConfig(block_d=64, num_warps=8, num_stages=3, parts=8, fold=(8, 2, 8), maxnreg=128)
_W256 = PanelConfig(
    block_d=64, num_warps=8, num_stages=3, parts=16, fold=(8, 2, 8), tile=(128, 256)
)
_SHARED = Gluon((256, 128), stages=4, parts=8, num_warps=8)
_TURNS = Gluon((128, 128), stages=6, parts=8, shared=False, num_warps=8)
_WIDE = Gluon((128, 256), stages=4, parts=16)

CANDIDATES: dict[str, PanelConfig | Tma | Gluon] = {
    "pointers_128x128": _W128,
    "tma_128x128": Tma(_W128, persistent=False),
    "gluon_shared": _SHARED,
    "gluon_shared_staged": replace(_SHARED, store_buffers=1),
    "gluon_shared_group16": replace(_SHARED, group_m=16),
    "gluon_shared_wide": replace(_WIDE, store_buffers=2),
    "gluon_turns": _TURNS,
    "gluon_turns_s5": replace(_TURNS, stages=5),
    "gluon_turns_group16": replace(_TURNS, group_m=16),
    "gluon_turns_staged": replace(_TURNS, store_buffers=1),
    "gluon_turns_staged2": replace(_TURNS, stages=5, store_buffers=2),
    "gluon_turns_64x256": replace(_WIDE, tile=(64, 256), stages=5, shared=False),
}
# What is left out shows where the time goes. Not right, and only timed.
ABLATIONS: dict[str, Gluon] = {
    "gluon_shared_bare": replace(_SHARED, mode="bare"),
    "gluon_shared_wide_bare": replace(_WIDE, mode="bare", store_buffers=2),
    "gluon_turns_bare": replace(_TURNS, mode="bare"),
    "gluon_turns_loads": replace(_TURNS, mode="loads"),
}


class _Candidate(TritonPanel):
    """The shipped panel with another kernel."""

    config_of: PanelConfig | Tma | Gluon
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

    def launch(
        self, tiles: int, x: Tensor, y: Tensor, partials: Tensor, scalars: tuple
    ) -> None: ...


class _GluonCandidate(_Candidate):
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
            descriptor(self.g, config.rows, 64) if staged else None,
            partials,
            *scalars,
            self.g.stride(0),
            D=x.shape[1],
            GROUP_M=config.group_m,
            STAGES=config.stages,
            PARTS=config.parts,
            GRAD_SCALE=self.grad_scale,
            SCALAR_GRADS=True,
            SHARED=config.shared,
            HOLD=config.hold,
            STORE_BUFFERS=config.store_buffers,
            MODE=config.mode,
            REGISTERS=config.registers,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )


class _TmaCandidate(_Candidate):
    def launch(self, tiles: int, x: Tensor, y: Tensor, partials: Tensor, scalars: tuple) -> None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        from .tma_panel import panel_tma_kernel

        config = self.config_of.config
        (block_m, block_n), block_d = config.tile, config.block_d
        persistent = self.config_of.persistent
        panel_tma_kernel[(min(self.programs, tiles) if persistent else tiles,)](
            TensorDescriptor.from_tensor(x, [block_m, block_d]),
            TensorDescriptor.from_tensor(y, [block_n, block_d]),
            self.g,
            partials,
            *scalars,
            self.g.stride(0),
            D=x.shape[1],
            GRAD_SCALE=self.grad_scale,
            PERSISTENT=persistent,
            **config.constants(),
            **config.options(),
        )


class _PointerCandidate(TritonPanel):
    config_of: PanelConfig

    def config(self, dtype: torch.dtype, precision: str) -> PanelConfig:
        return self.config_of


def panel_of(name: str) -> type[Panel]:
    """The panel class of a candidate or an ablation."""
    config = (CANDIDATES | ABLATIONS)[name]
    fields = {"tile": config.tile, "config_of": config}
    if isinstance(config, Gluon):
        fields["slots"] = 2 if config.shared else 1
        return type(name, (_GluonCandidate,), fields)
    base = _TmaCandidate if isinstance(config, Tma) else _PointerCandidate
    return type(name, (base,), fields)
