"""The Triton backend, from the host: CUDA (compute capability 8.0 up), ROCm, the interpreter."""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor

from . import hopper
from .float_keys import KEY_BITS
from .interface import (
    GRAD_SCALE,
    Affine,
    Pairs,
    PanelSpec,
    RandomMask,
    RowValues,
    ScoreNormalizer,
    ScoreThreshold,
    ceil_div,
)
from .registry import float32_products, gpu, multiplies_half_into_fp32
from .torch_products import add_product
from .triton_arguments import diagonal_arg, ids_args, selection_args, weight_args
from .triton_configs import TILE, PanelConfig, count_config, panel_config
from .triton_kernels import count_kernel, panel_kernel
from .triton_operands import INTERPRETED, multiplied, stored_dtype
from .triton_products import ProductConfig, TileLists, add_tiled_product, list_elements
from .triton_scores import launch_best, launch_count
from .triton_totals import TritonTotals


def _may_skip(selection: RandomMask | ScoreThreshold | None, tile: tuple[int, int]) -> bool:
    """Whether there may be tiles where no pair takes part: hardly ever among many random pairs."""
    if isinstance(selection, RandomMask):
        return selection.share * math.prod(tile) < 16  # from there on less than one tile in e^16
    return selection is not None


COUNT_BITS = (5, 5, 10)  # of the steps in which thresholds are found
TALLIED_BITS = 5  # at most


class CountConstants(TypedDict):
    """The counting kernel's compile-time constants that depend on the step."""

    SHIFT: int
    BITS: int
    TALLIED: bool


def count_constants(step: int) -> CountConstants:
    """Those of one step."""
    bits = COUNT_BITS[step]
    return {
        "SHIFT": KEY_BITS - sum(COUNT_BITS[: step + 1]),
        "BITS": bits,
        "TALLIED": bits <= TALLIED_BITS,
    }


class TritonPanel(TritonTotals):
    """A :class:`fused_siglip.kernels.Panel` in one fused kernel.

    The logits are fp32 and never leave the registers. What is written is dlogits, three sums a tile
    and, where negatives are selected, a flag. Where images' losses are wanted, the sums of a
    tile's rows are written too.
    """

    tile = TILE
    align = 16  # what Triton tells apart: only then are loads wide
    dscale_from_products = False  # dlogits are rounded before they enter the products
    hopper = hopper.HOPPER
    hopper_tiles = 2  # a program at least: with fewer there is nothing to overlap
    count_bits: tuple[int, ...] = COUNT_BITS

    @classmethod
    def _tiles(cls, rows: int, cols: int) -> tuple[int, int]:
        return ceil_div(rows, cls.tile[0]), ceil_div(cols, cls.tile[1])

    @classmethod
    def workspace_bytes(cls, spec: PanelSpec) -> int:
        tiles_m, tiles_n = cls._tiles(spec.rows, spec.cols)
        tiles = tiles_m * tiles_n
        int32 = torch.int32.itemsize
        total = tiles * (3 if spec.scalar_grads else 1) * torch.float32.itemsize
        if spec.store_dlogits:
            total += tiles * math.prod(cls.tile) * stored_dtype(spec.dtype).itemsize
        if spec.filters_negatives and spec.store_dlogits:
            total += (tiles + list_elements(tiles_m, tiles_n)) * int32
        elif spec.filters_negatives:
            total += tiles_n * spec.rows * 2**TALLIED_BITS
        if spec.image_losses:
            total += tiles_n * spec.rows * torch.float32.itemsize
        return total

    def __init__(self, spec: PanelSpec, device: torch.device):
        device = torch.device(device)
        _check_can_run(spec.dtype, device)
        self.target: tuple[int, int] | str
        if INTERPRETED:
            self.target = (8, 0)
        elif torch.version.hip:
            self.target = "hip"
        else:
            self.target = gpu(device).capability
        tiles_m, tiles_n = self._tiles(spec.rows, spec.cols)
        self.totals: list[float] = []  # the host would have to wait for them
        self.sums = 3 if spec.scalar_grads else 1
        self.partials = torch.empty(
            self.sums, tiles_m * tiles_n, dtype=torch.float32, device=device
        )
        self.dlogits: Tensor | None = None
        self.flags: Tensor | None = None
        self.lists: Tensor | None = None
        self.tallies: Tensor | None = None
        self.row_losses: Tensor | None = None
        self.skips = False  # whether the products of the last call skip tiles
        self.library = spec.dtype == torch.float32 or multiplies_half_into_fp32(device.type)
        if spec.store_dlogits:
            # Whole tiles, so that the kernel stores without a mask and rows stay aligned.
            shape = (tiles_m * self.tile[0], tiles_n * self.tile[1])
            self.dlogits = torch.empty(shape, dtype=stored_dtype(spec.dtype), device=device)
        if spec.filters_negatives and spec.store_dlogits:
            self.flags, self.lists = (
                torch.empty(size, dtype=torch.int32, device=device)
                for size in (tiles_m * tiles_n, list_elements(tiles_m, tiles_n))
            )
        elif spec.filters_negatives:
            # Where nothing is written negatives may be counted: a byte by tile column, image, bin.
            size = tiles_n * spec.rows * 2**TALLIED_BITS
            self.tallies = torch.empty(size, dtype=torch.uint8, device=device)
        if spec.image_losses:
            size = tiles_n * spec.rows
            self.row_losses = torch.empty(size, dtype=torch.float32, device=device)
        self.dtype, self.weighted = spec.dtype, spec.weighted
        self.grad_scale = GRAD_SCALE.get(spec.dtype, 1.0)

    def _precision(self) -> str:
        if self.dtype != torch.float32 or self.target == "hip":
            return "ieee"
        return "ieee" if float32_products() == "ieee" else "tf32"

    def config(self, dtype: torch.dtype, precision: str) -> PanelConfig:
        stores = self.dlogits is not None
        return panel_config(self.target, dtype, precision, stores, self.weighted)

    def __call__(
        self,
        x: Tensor,  # (m, D)
        y: Tensor,  # (n, D)
        affine: Affine,
        pairs: Pairs,
        sums: Tensor | None,  # (3,)
        selection: RandomMask | ScoreThreshold | None = None,
        image_losses: Tensor | None = None,  # (m,)
    ) -> Tensor | None:  # (m, n)
        m, n = x.shape[0], y.shape[0]
        plain = selection is None and pairs.ids is None and pairs.weights is None
        on_hopper = plain and self._on_hopper(x, y)
        tiles = self.hopper.tiles(m, n) if on_hopper else math.prod(self._tiles(m, n))
        if self.partials.shape[1] != tiles:
            self.partials = self.partials.as_strided((self.sums, tiles), (tiles, 1))
        self.skips = self.flags is not None and _may_skip(selection, self.tile)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            if on_hopper:
                hopper.launch_panel(
                    self.hopper, x, y, self.dlogits, self.partials, affine, diagonal_arg(pairs, n),
                    self.grad_scale,
                )  # fmt: skip
            else:
                losses = self._launch(x, y, affine, pairs, selection)
                if image_losses is not None and losses is not None:
                    image_losses += losses.sum(0)
            if sums is not None:
                torch.sum(self.partials, 1, out=sums[: self.sums])
        dlogits = self.dlogits
        if dlogits is None:
            return None
        if dlogits.shape != (m, n):
            dlogits = dlogits[:m, :n]
        return dlogits if dlogits.dtype == self.dtype else dlogits.to(self.dtype)

    def _launch(
        self,
        x: Tensor,  # (m, D)
        y: Tensor,  # (n, D)
        affine: Affine,
        pairs: Pairs,
        selection: RandomMask | ScoreThreshold | None,
    ) -> Tensor | None:  # (tile columns, m): the losses of rows, where they are wanted
        (m, d), n = x.shape, y.shape[0]
        precision = self._precision()
        x, y = multiplied(x, precision), multiplied(y, precision)
        config, losses = self.config(x.dtype, precision), None
        if self.row_losses is not None:
            config, tiles_n = config.by_row(), self._tiles(m, n)[1]
            losses = self.row_losses[: tiles_n * m].view(tiles_n, m)
        panel_kernel[(self.partials.shape[1],)](
            x,
            y,
            self.dlogits,
            self.partials,
            *affine,
            *ids_args(pairs),
            *selection_args(selection),
            *weight_args(pairs.weights),
            self.flags,
            losses,
            m,
            n,
            diagonal_arg(pairs, n),
            selection.hash_cutoff if isinstance(selection, RandomMask) else None,
            *x.stride(),
            *y.stride(),
            0 if self.dlogits is None else self.dlogits.stride(0),
            D=d,
            SCALAR_GRADS=self.sums == 3,
            GRAD_SCALE=self.grad_scale,
            INPUT_PRECISION=precision,
            **config.constants(),
            **config.options(),
        )
        return losses

    def _on_hopper(self, x: Tensor, y: Tensor) -> bool:
        """Whether the warp-specialized kernel takes this panel."""
        if not hopper.suits(self.target, self.dtype) or not (hopper.reads(x) and hopper.reads(y)):
            return False
        at_least = self.hopper_tiles * gpu(x.device).multiprocessors
        return self.hopper.tiles(x.shape[0], y.shape[0]) >= at_least

    def add_product(
        self,
        out: Tensor,  # (m, D) or, transposed, (n, D)
        dlogits: Tensor,  # (m, n)
        rhs: Tensor,  # (n, D) or, transposed, (m, D)
        alpha: float,
        accumulate: bool,
        transposed: bool,
    ) -> None:
        if self.library and not self.skips:
            add_product(out, dlogits.T if transposed else dlogits, rhs, alpha, accumulate)
            return
        assert self.dlogits is not None  # dlogits are a view of it
        lists = None
        if self.skips and self.flags is not None and self.lists is not None:
            tiles = self._tiles(*dlogits.shape)
            flags = self.flags[: math.prod(tiles)].view(tiles)
            lists = TileLists(flags.T if transposed else flags, self.lists)
        precision = self._precision()
        whole, tile = multiplied(self.dlogits.to(self.dtype), precision), self.tile
        if transposed:
            whole, tile = whole.T, tile[::-1]
        rhs = multiplied(rhs, precision)
        config = ProductConfig(self.config(rhs.dtype, precision), tile, precision)
        add_tiled_product(out, whole, rhs, lists, alpha, accumulate, config)

    def count(
        self,
        x: Tensor,  # (m, D)
        y: Tensor,  # (n, D)
        pairs: Pairs,
        normalizer: ScoreNormalizer,
        prefix: Tensor | None,  # (m,) int32
        step: int,
        counts: Tensor,  # (m, 2**bits) int32
    ) -> None:
        (m, d), n = x.shape, y.shape[0]
        precision = self._precision()
        x, y = multiplied(x, precision), multiplied(y, precision)
        constants, (tiles_m, tiles_n) = count_constants(step), self._tiles(m, n)
        config = count_config(self.target, x.dtype, precision, constants["TALLIED"])
        written = counts
        if constants["TALLIED"]:
            assert self.tallies is not None  # of a panel that filters negatives and stores nothing
            written = self.tallies[: tiles_n * counts.numel()].view(tiles_n, m, -1)
        with torch.cuda.device_of(x):
            count_kernel[(tiles_m * tiles_n,)](
                x,
                y,
                *ids_args(pairs),
                *normalizer,
                prefix,
                written,
                m,
                n,
                diagonal_arg(pairs, n),
                *x.stride(),
                *y.stride(),
                D=d,
                **constants,
                INPUT_PRECISION=precision,
                **config.tile_constants(),
                **config.options(),
            )
        if constants["TALLIED"]:
            counts += written.sum(0, dtype=torch.int32)

    def best_positives(
        self,
        x: Tensor,  # (m, D)
        y: Tensor,  # (n, D)
        pairs: Pairs,
        best: RowValues,
    ) -> None:
        precision = self._precision()
        x, y = multiplied(x, precision), multiplied(y, precision)
        config = panel_config(self.target, x.dtype, precision, store_dlogits=False)
        launch_best(x, y, pairs, best, precision, config)

    def count_not_below(
        self,
        x: Tensor,  # (m, D)
        y: Tensor,  # (n, D)
        pairs: Pairs,
        best: RowValues,
        counts: RowValues,
        same_panel: bool = False,  # no product is kept: it is computed again
    ) -> None:
        precision = self._precision()
        x, y = multiplied(x, precision), multiplied(y, precision)
        config = panel_config(self.target, x.dtype, precision, store_dlogits=False)
        launch_count(x, y, pairs, best, counts, precision, config)


def _check_can_run(dtype: torch.dtype, device: torch.device) -> None:
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"the Triton backend needs a CUDA or ROCm device, got {device} (it runs on the CPU "
            "only in Triton's interpreter: set TRITON_INTERPRET=1 before starting Python)"
        )
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"the Triton backend takes float32, bfloat16 or float16 operands, got {dtype}"
        )
