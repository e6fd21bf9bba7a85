"""How the pair matrix is cut into panels, and what memory that takes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from .kernels import Panel, multiplies_half_into_fp32, panel_class

# Without a caller's bound. On a CPU: fp32 panels of 2048 x 2048, which stay in the last-level
# cache while products are near their best; a GPU panel wants to be large enough to fill the chip in
# all three products.
_DEFAULT_WORKSPACE = {"cpu": 19 << 20}
_DEFAULT_WORKSPACE_GPU = 384 << 20

# What one multiprocessor computes at a time in the library's large half-precision products.
LIBRARY_TILE = (128, 256)


@dataclass(frozen=True)
class PanelPlan:
    """The panels of one sweep over an (M, N) pair matrix of D-dimensional features.

    ``rows`` x ``cols`` is the panel's shape (the last ones may be smaller), ``operand_dtype`` what
    enters the three products, ``accumulate_dtype`` what they and the sums accumulate in.
    ``operand_dim`` is D, rounded up to what the backend asks for.
    ``workspace_bytes`` is the backend's panel workspace, ``peak_bytes`` all that the sweep
    allocates: workspace, operand copies and the gradient accumulators it returns.
    """

    rows: int
    cols: int
    operand_dtype: torch.dtype
    operand_dim: int
    accumulate_dtype: torch.dtype
    workspace_bytes: int
    peak_bytes: int


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def waves(total: int, side: int, d: int, multiprocessors: int) -> int:
    """Waves that a product with outputs (side, d) takes for ``total`` rows, panel by panel.

    A wave is one output tile on every multiprocessor; a last wave costs as much as a full one.
    """
    tile_rows, tile_cols = LIBRARY_TILE
    whole, rest = divmod(total, side)
    tiles = [_ceil_div(rows, tile_rows) * _ceil_div(d, tile_cols) for rows in (side, rest)]
    return whole * _ceil_div(tiles[0], multiprocessors) + _ceil_div(tiles[1], multiprocessors)


def _side(total: int, most: int, tile: int, d: int, multiprocessors: int | None) -> int:
    """A panel's side for ``total`` rows, of at most ``most`` tiles."""
    if multiprocessors is None or most * tile >= total:
        tiles = max(_ceil_div(total, tile), 1)  # a rank may have no rows
        return _ceil_div(tiles, _ceil_div(tiles, most)) * tile

    def cost(side: int) -> tuple[int, int, int]:
        return waves(total, side, d, multiprocessors), _ceil_div(total, side), side

    # fewer waves first, then fewer panels, then the smaller workspace; down to half of what fits
    return min((tiles * tile for tiles in range(max(most // 2, 1), most + 1)), key=cost)


def plan_panels(
    m: int,
    n: int,
    d: int,
    dtype: torch.dtype,
    device_type: str,
    backend: str,
    *,
    need_image_grad: bool = True,
    need_text_grad: bool = True,
    need_scalar_grads: bool = True,
    filters_negatives: bool = False,
    copies_operands: bool = False,
    multiprocessors: int | None = None,
    workspace_bytes: int | None = None,
) -> PanelPlan:
    """Choose the panels: a pure function of its arguments; asks no device anything.

    Panels are as square as the budget allows, since every panel reads and writes its rows of dX and
    its columns of dY once: that traffic is proportional to 1/rows + 1/cols. On a GPU the sides are
    then cut back to where the products dX and dY fill whole waves of its ``multiprocessors``;
    elsewhere they are evened out, so that the last panel is not a sliver.

    ``copies_operands`` says that the sweep copies rows before use, whatever D: padding must be
    blanked out, or the features' strides do not suit the backend. ``filters_negatives`` says that negatives
    are chosen, or counted.

    Raises ValueError when ``workspace_bytes`` cannot hold one tile.
    """
    return _plan(
        panel_class(backend), multiplies_half_into_fp32(device_type), m, n, d, dtype, device_type,
        backend, need_image_grad, need_text_grad, need_scalar_grads, filters_negatives, copies_operands,
        multiprocessors, workspace_bytes,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)  # steps of a training ask for the same plan again
def _plan(
    panel: type[Panel],
    half_products: bool,  # half operands, accumulated in fp32
    m: int,
    n: int,
    d: int,
    dtype: torch.dtype,
    device_type: str,
    backend: str,
    need_image_grad: bool,
    need_text_grad: bool,
    need_scalar_grads: bool,
    filters_negatives: bool,
    copies_operands: bool,
    multiprocessors: int | None,
    workspace_bytes: int | None,
) -> PanelPlan:
    accumulate_dtype = torch.promote_types(dtype, torch.float32)
    # Where the library products cannot take half operands and accumulate in fp32 (Triton's own
    # can), a panel's rows and columns are converted when it is their turn.
    operand_dtype = dtype if backend == "triton" or half_products else accumulate_dtype
    operand_dim = _ceil_div(d, panel.align) * panel.align
    store_dlogits = need_image_grad or need_text_grad

    def workspace(rows: int, cols: int) -> int:
        return panel.workspace_bytes(
            rows, cols, operand_dtype, store_dlogits, need_scalar_grads, filters_negatives
        )

    budget = workspace_bytes
    if budget is None:
        budget = _DEFAULT_WORKSPACE.get(device_type, _DEFAULT_WORKSPACE_GPU)
    tile_m, tile_n = min(panel.tile[0], max(m, 1)), min(panel.tile[1], max(n, 1))
    tile_bytes = workspace(tile_m, tile_n)
    if budget < tile_bytes:
        raise ValueError(
            f"workspace_bytes={budget} cannot hold one {tile_m} x {tile_n} tile of the {backend} "
            f"backend: expected at least {tile_bytes}"
        )

    tiles = budget // tile_bytes
    side = math.isqrt(tiles)  # of a square of tiles: a backend may take less for many than for one
    while side < max(m, n) and workspace((side + 1) * tile_m, (side + 1) * tile_n) <= budget:
        side += 1
    tiles_m, tiles_n = max(_ceil_div(m, tile_m), 1), max(_ceil_div(n, tile_n), 1)

    def shape(tiles: int) -> tuple[int, int]:
        rows = min(tiles_m, max(math.isqrt(tiles), tiles // tiles_n))
        cols = min(tiles_n, tiles // rows)
        rows = min(_side(m, rows, tile_m, d, multiprocessors), m)
        return rows, min(_side(n, cols, tile_n, d, multiprocessors), n)

    rows, cols = shape(max(tiles, side * side))
    if workspace(rows, cols) > budget:
        rows, cols = shape(tiles)
    used = workspace(rows, cols)
    peak = used + (need_image_grad * m + need_text_grad * n) * d * accumulate_dtype.itemsize
    if copies_operands or operand_dim != d or operand_dtype != dtype:
        peak += (rows + cols) * operand_dim * operand_dtype.itemsize
    return PanelPlan(rows, cols, operand_dtype, operand_dim, accumulate_dtype, used, peak)
