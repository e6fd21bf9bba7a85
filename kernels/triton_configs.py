"""Fixed launch configurations of the Triton panel kernel: no autotuning, no device query."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

# The workspace is made of whole tiles: of one size, so that it does not depend on the device.
TILE = (128, 128)


@dataclass(frozen=True)
class PanelConfig:
    """How the panel kernel is compiled and launched.

    epilogue_subtiles and fold follow the layout in which the tensor cores leave the accumulator:
    every thread holds columns of each subtile, and what folds together belongs to one thread. Other
    values are correct too, but then threads exchange data in every subtile, and more sums stay in
    registers. What the compilers make of each config is printed by benchmarks/suites/compiled.py
    and checked by tests/triton_backend/test_triton_compiled.py.
    """

    block_d: int  # features a step of the product takes
    num_warps: int
    num_stages: int  # steps in flight from global to shared memory
    epilogue_subtiles: int  # column blocks of a tile that the epilogue takes in turn
    fold: tuple[
        int, int, int
    ]  # shape of the running sums: ROW_GROUPS, PAIR_ROWS, FOLD_COLS of _fold
    maxnreg: int | None = None  # CUDA: registers a thread, at most
    group_m: int = 8  # tile rows that share a band of y in L2
    tile: tuple[int, int] = TILE

    def tile_constants(self) -> dict[str, int]:
        """Compile-time constants of a kernel that computes similarities."""
        return {
            "BLOCK_M": self.tile[0],
            "BLOCK_N": self.tile[1],
            "BLOCK_D": self.block_d,
            "GROUP_M": self.group_m,
            "SUBTILES": self.epilogue_subtiles,
        }

    def constants(self) -> dict[str, int]:
        """The panel kernel's compile-time constants."""
        return self.tile_constants() | {
            "ROW_GROUPS": self.fold[0],
            "PAIR_ROWS": self.fold[1],
            "FOLD_COLS": self.fold[2],
        }

    def by_row(self) -> PanelConfig:
        """With running sums of each row, for the losses of images."""
        return replace(self, fold=(self.tile[0] // 8, 1, self.fold[2]))

    def options(self) -> dict[str, int | bool]:
        """The compiler's options."""
        # Fused multiply-add is asked for by name: Triton is about to change its default, and the
        # polynomial of the epilogue costs twice as much without.
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }
        if self.maxnreg is not None:
            options["maxnreg"] = self.maxnreg
        return options


# Half operands leave room for two programs on a multiprocessor: the epilogue of one runs under the
# product of the other.

# Two by two warps take 16 rows and 8 columns each; a thread holds rows 8 apart. 48 KiB: consumer
# chips have 100 a multiprocessor.
_MMA = PanelConfig(block_d=32, num_warps=4, num_stages=4, epilogue_subtiles=8, fold=(2, 2, 16))
# Two by four warps.
_MMA_TF32 = PanelConfig(block_d=32, num_warps=8, num_stages=3, epilogue_subtiles=4, fold=(2, 2, 32))
# Eight warps below one another take 16 rows each; a thread holds rows 8 apart, and 2 of every 8
# columns.
_WGMMA = PanelConfig(
    block_d=64, num_warps=8, num_stages=3, epilogue_subtiles=8, fold=(8, 2, 8), maxnreg=128
)
_WGMMA_TF32 = replace(_WGMMA, block_d=32)
# A thread reads a whole row back from tensor memory.
_TCGEN05 = PanelConfig(block_d=64, num_warps=4, num_stages=3, epilogue_subtiles=8, fold=(16, 1, 2))
_TCGEN05_TF32 = replace(_TCGEN05, block_d=32)
# Where no dlogits are written, sums folded to two columns spill with Triton 3.9.
_TCGEN05_SUMS = (16, 1, 8)
_TCGEN05_WEIGHTED_SUMS = (16, 1, 4)  # with weights those spill
# Products in full fp32 run outside the tensor cores and dwarf the epilogue: no spills is enough.
_FMA = PanelConfig(block_d=16, num_warps=8, num_stages=3, epilogue_subtiles=8, fold=(16, 1, 8))
_MFMA = PanelConfig(block_d=32, num_warps=8, num_stages=2, epilogue_subtiles=4, fold=(4, 1, 32))


def panel_config(
    target: tuple[int, int] | str,
    dtype: torch.dtype,
    precision: str,
    store_dlogits: bool,
    weighted: bool = False,
) -> PanelConfig:
    """The configuration for a device and operands.

    target: CUDA compute capability, or "hip". dtype: of the operands. precision: "ieee" or "tf32",
    how fp32 operands are multiplied (no meaning for the other dtypes). store_dlogits: whether the
    kernel writes dlogits, or only sums. weighted: whether pairs have weights.
    """
    if dtype == torch.float32 and precision == "ieee":
        return _FMA
    if target == "hip":
        return _MFMA
    tf32 = dtype == torch.float32
    if target[0] == 9:
        return _WGMMA_TF32 if tf32 else _WGMMA
    if target[0] == 10:
        config = _TCGEN05_TF32 if tf32 else _TCGEN05
        sums = _TCGEN05_WEIGHTED_SUMS if weighted else _TCGEN05_SUMS
        return config if store_dlogits else replace(config, fold=sums)
    return _MMA_TF32 if tf32 else _MMA


def count_config(
    target: tuple[int, int] | str, dtype: torch.dtype, precision: str, tallied: bool
) -> PanelConfig:
    """The configuration of the kernel that counts logits, in registers (``tallied``) or memory."""
    config = panel_config(target, dtype, precision, store_dlogits=False)
    # With four warps a thread holds eight rows, and has no registers left for their tallies.
    return replace(config, num_warps=8) if tallied and config is _MMA else config
