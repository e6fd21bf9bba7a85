"""Panel kernel in Triton: CUDA (compute capability 8.0 up), ROCm, and the Triton interpreter."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from . import hopper
from .float_keys import PLACE_BITS
from .interface import GRAD_SCALE, Pairs, RandomMask, ScoreThreshold
from .registry import float32_products, multiplies_half_into_fp32
from .torch_products import add_product
from .triton_configs import TILE, PanelConfig, count_config, panel_config
from .triton_kernels import count_kernel, panel_kernel
from .triton_products import add_tiled_product, list_elements
from .triton_totals import finish

INTERPRETED = not isinstance(panel_kernel, triton.JITFunction)  # decided when it was decorated


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the kernel writes g: the interpreter cuts bf16 off where devices round."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def _multiplied(features: Tensor, precision: str) -> Tensor:
    """Features as tl.dot multiplies them.

    The interpreter's takes the bits of bf16 for a number. In tf32 the tensor cores cut the last 13
    bits off where the libraries round: every similarity would come out a little too small, and at
    t = 100 the loss 0.4% off (on an H100: benchmarks/results, device, matmul_precision "high").
    """
    if INTERPRETED and features.dtype == torch.bfloat16:
        return features.float()
    return round_to_tf32(features) if precision == "tf32" else features


def round_to_tf32(features: Tensor) -> Tensor:
    """float32 to the nearest number with 10 bits of mantissa, ties away from zero."""
    if features.dtype != torch.float32:
        return features
    rounded = (features.view(torch.int32) + (1 << 12)).bitwise_and_(-1 << 13).view(torch.float32)
    return torch.where(features.isfinite(), rounded, features)


def _diagonal(positives: Pairs, n: int) -> int:
    # no pair is (i, i + n): without a diagonal, the same kernel never meets it
    return n if positives.diagonal is None else positives.diagonal


def _may_skip(kept: RandomMask | ScoreThreshold | None, tile: tuple[int, int]) -> bool:
    """Whether there may be tiles without a kept pair: hardly ever among many random pairs."""
    if isinstance(kept, RandomMask):
        return kept.share * math.prod(tile) < 16  # from there on less than one tile in e^16
    return kept is not None


COUNT_BITS = (5, 5, 10)  # of the steps in which thresholds are found
TALLIED_BITS = 5  # at most


def count_constants(step: int) -> dict[str, int | bool]:
    """The counting kernel's compile-time constants that depend on the step."""
    bits = COUNT_BITS[step]
    return {
        "SHIFT": PLACE_BITS - sum(COUNT_BITS[: step + 1]),
        "BITS": bits,
        "TALLIED": bits <= TALLIED_BITS,
    }


class TritonPanel:
    """A :class:`fused_siglip.kernels.Panel` in one fused kernel.

    The logits are fp32 and never leave the registers; what is written is g, three sums a tile
    and, where negatives are chosen, a flag.
    """

    tile = TILE
    align = 16  # what Triton tells apart: only then are loads wide
    gs_from_products = False  # g is rounded before it enters them
    finish = staticmethod(finish)
    hopper = hopper.HOPPER
    hopper_tiles = 2  # a program at least: with fewer there is nothing to overlap
    count_bits = COUNT_BITS

    @classmethod
    def _tiles(cls, rows: int, cols: int) -> tuple[int, int]:
        return triton.cdiv(rows, cls.tile[0]), triton.cdiv(cols, cls.tile[1])

    @classmethod
    def workspace_bytes(
        cls,
        rows: int,
        cols: int,
        dtype: torch.dtype,
        store_dlogits: bool,
        scalar_grads: bool,
        filters_negatives: bool = False,
    ) -> int:
        tiles_m, tiles_n = cls._tiles(rows, cols)
        tiles = tiles_m * tiles_n
        g = tiles * math.prod(cls.tile) * stored_dtype(dtype).itemsize if store_dlogits else 0
        sums = tiles * (3 if scalar_grads else 1) * torch.float32.itemsize
        kept = tiles + list_elements(tiles_m, tiles_n) if store_dlogits and filters_negatives else 0
        tallies = 0 if store_dlogits or not filters_negatives else tiles_n * rows * 2**TALLIED_BITS
        return g + sums + kept * torch.int32.itemsize + tallies

    def __init__(
        self,
        rows: int,
        cols: int,
        dtype: torch.dtype,
        device: torch.device,
        store_dlogits: bool,
        scalar_grads: bool,
        filters_negatives: bool = False,
    ):
        device = torch.device(device)
        if device.type != "cuda" and not INTERPRETED:
            raise ValueError(
                f"the Triton backend needs a CUDA or ROCm device, got {device} (it runs on the CPU "
                "only in Triton's interpreter: set TRITON_INTERPRET=1 before starting Python)"
            )
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"the Triton backend takes float32, bfloat16 or float16 operands, got {dtype}"
            )
        if INTERPRETED:
            self.target = (8, 0)
        elif torch.version.hip:
            self.target = "hip"
        else:
            self.target = torch.cuda.get_device_capability(device)
        tiles_m, tiles_n = self._tiles(rows, cols)
        self.sums = 3 if scalar_grads else 1
        self.partials = torch.empty(
            self.sums, tiles_m * tiles_n, dtype=torch.float32, device=device
        )
        # Whole tiles, so that the kernel stores without a mask and rows stay aligned.
        shape = (tiles_m * self.tile[0], tiles_n * self.tile[1])
        self.g = (
            torch.empty(shape, dtype=stored_dtype(dtype), device=device) if store_dlogits else None
        )
        self.flags = self.lists = None
        self.skips = False  # tiles, in the products of the last call
        self.library = dtype == torch.float32 or multiplies_half_into_fp32(device.type)
        if store_dlogits and filters_negatives:
            self.flags, self.lists = (
                torch.empty(size, dtype=torch.int32, device=device)
                for size in (tiles_m * tiles_n, list_elements(tiles_m, tiles_n))
            )
        # Where nothing is written negatives may be counted: a byte by tile column, image and bin.
        self.tallies = None
        if filters_negatives and not store_dlogits:
            size = tiles_n * rows * 2**TALLIED_BITS
            self.tallies = torch.empty(size, dtype=torch.uint8, device=device)
        self.dtype = dtype
        self.grad_scale = GRAD_SCALE.get(dtype, 1.0)

    def _precision(self) -> str:
        if self.dtype != torch.float32 or self.target == "hip":
            return "ieee"
        return "ieee" if float32_products() == "ieee" else "tf32"

    def config(self, dtype: torch.dtype, precision: str) -> PanelConfig:
        return panel_config(self.target, dtype, precision, self.g is not None)

    def __call__(
        self,
        x: Tensor,  # (m, D)
        y: Tensor,  # (n, D)
        logit_scale: Tensor,  # ()
        logit_bias: Tensor,  # ()
        positives: Pairs,
        sums: Tensor | None,  # (3,)
        kept: RandomMask | ScoreThreshold | None = None,
    ) -> Tensor | None:  # (m, n)
        (m, d), n = x.shape, y.shape[0]
        if kept is None and positives.image_ids is None and self._on_hopper(x, y):
            self.skips = False
            self._share_partials(self.hopper.tiles(m, n))
            with torch.cuda.device_of(x):
                hopper.launch_panel(
                    self.hopper, x, y, self.g, self.partials, logit_scale, logit_bias,
                    _diagonal(positives, n), self.grad_scale,
                )  # fmt: skip
                if sums is not None:
                    torch.sum(self.partials, 1, out=sums[: self.sums])
            return None if self.g is None else self.g[:m, :n]
        precision = self._precision()
        x, y = _multiplied(x, precision), _multiplied(y, precision)
        config = self.config(x.dtype, precision)
        tiles = math.prod(self._tiles(m, n))
        image_keys, text_keys, below = kept if isinstance(kept, RandomMask) else (None,) * 3
        centres, factors, least = kept if isinstance(kept, ScoreThreshold) else (None,) * 3
        self._share_partials(tiles)
        self.skips = self.flags is not None and _may_skip(kept, self.tile)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            panel_kernel[(tiles,)](
                x,
                y,
                self.g,
                self.partials,
                logit_scale,
                logit_bias,
                positives.image_ids,
                positives.text_ids,
                image_keys,
                text_keys,
                centres,
                factors,
                least,
                self.flags,
                m,
                n,
                _diagonal(positives, n),
                below,
                *x.stride(),
                *y.stride(),
                0 if self.g is None else self.g.stride(0),
                D=d,
                SCALAR_GRADS=self.sums == 3,
                GRAD_SCALE=self.grad_scale,
                INPUT_PRECISION=precision,
                **config.constants(),
                **config.options(),
            )
            if sums is not None:
                torch.sum(self.partials, 1, out=sums[: self.sums])
        return None if self.g is None else self.g[:m, :n].to(self.dtype)

    def _share_partials(self, tiles: int) -> None:
        if self.partials.shape[1] != tiles:
            self.partials = self.partials.as_strided((self.sums, tiles), (tiles, 1))

    def _on_hopper(self, x: Tensor, y: Tensor) -> bool:
        """Whether the warp-specialised kernel takes this panel."""
        if not hopper.suits(self.target, self.dtype) or not (hopper.reads(x) and hopper.reads(y)):
            return False
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count
        return self.hopper.tiles(len(x), len(y)) >= self.hopper_tiles * programs

    def add_product(
        self,
        out: Tensor,  # (m, D) or, transposed, (n, D)
        g: Tensor,  # (m, n)
        other: Tensor,  # (n, D) or, transposed, (m, D)
        alpha: float,
        fresh: bool,
        transposed: bool,
    ) -> None:
        if self.library and not self.skips:
            add_product(out, g.T if transposed else g, other, alpha, fresh)
            return
        flags = None
        if self.skips:
            tiles = self._tiles(*g.shape)
            flags = self.flags[: math.prod(tiles)].view(tiles)
        precision = self._precision()
        whole, tile = _multiplied(self.g.to(self.dtype), precision), self.tile  # g is a view of it
        if transposed:
            whole, tile = whole.T, tile[::-1]
            flags = None if flags is None else flags.T
        other = _multiplied(other, precision)
        config = self.config(other.dtype, precision)
        add_tiled_product(
            out, whole, other, flags, self.lists, alpha, fresh, config, tile, precision
        )

    def count(
        self,
        x: Tensor,  # (m, D)
        y: Tensor,  # (n, D)
        positives: Pairs,
        centres: Tensor,  # (m,)
        factors: Tensor,  # (m,)
        known: Tensor | None,  # (m,) int32
        step: int,
        counts: Tensor,  # (m, 2**bits) int32
    ) -> None:
        (m, d), n = x.shape, y.shape[0]
        precision = self._precision()
        x, y = _multiplied(x, precision), _multiplied(y, precision)
        constants, (tiles_m, tiles_n) = count_constants(step), self._tiles(m, n)
        config = count_config(self.target, x.dtype, precision, constants["TALLIED"])
        written = counts
        if constants["TALLIED"]:
            written = self.tallies[: tiles_n * counts.numel()].view(tiles_n, m, -1)
        with torch.cuda.device_of(x):
            count_kernel[(tiles_m * tiles_n,)](
                x,
                y,
                positives.image_ids,
                positives.text_ids,
                centres,
                factors,
                known,
                written,
                m,
                n,
                _diagonal(positives, n),
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
