"""How the pair matrix is cut into panels, and what memory that takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .kernels import (
    Panel,
    PanelSpec,
    accumulate_dtype,
    multiplies_half_into_fp32,
    panel_class,
)
from .kernels.interface import ceil_div
from .spec import GradMask

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

    ``panel`` has the panels' shape (the last ones may be smaller) and the dtype that enters the
    three products, ``accumulate_dtype`` is what they and the sums accumulate in. ``operand_dim`` is
    D, rounded up to what the backend asks for. ``workspace_bytes`` is the backend's panel
    workspace, ``peak_bytes`` all that the sweep allocates: workspace, operand copies and the
    gradient accumulators it returns.
    """

    panel: PanelSpec
    operand_dim: int
    accumulate_dtype: torch.dtype
    workspace_bytes: int
    peak_bytes: int

    @property
    def rows(self) -> int:
        return self.panel.rows

    @property
    def cols(self) -> int:
        return self.panel.cols

    @property
    def operand_dtype(self) -> torch.dtype:
        return self.panel.dtype


def waves(total: int, side: int, d: int, multiprocessors: int) -> int:
    """Waves that a product with outputs (side, d) takes for ``total`` rows, panel by panel.

    A wave is one output tile on every multiprocessor; a last wave costs as much as a full one.
    """
    tile_rows, tile_cols = LIBRARY_TILE
    whole, rest = divmod(total, side)
    tiles = [ceil_div(rows, tile_rows) * ceil_div(d, tile_cols) for rows in (side, rest)]
    return whole * ceil_div(tiles[0], multiprocessors) + ceil_div(tiles[1], multiprocessors)


def _side(total: int, most: int, tile: int, d: int, multiprocessors: int | None) -> int:
    """A panel's side for ``total`` rows, of at most ``most`` tiles."""
    if multiprocessors is None or most * tile >= total:
        tiles = max(ceil_div(total, tile), 1)  # a rank may have no rows
        return ceil_div(tiles, ceil_div(tiles, most)) * tile

    def cost(side: int) -> tuple[int, int, int]:
        return waves(total, side, d, multiprocessors), ceil_div(total, side), side

    # fewer waves first, then fewer panels, then the smaller workspace; down to half of what fits
    return min((tiles * tile for tiles in range(max(most // 2, 1), most + 1)), key=cost)


class PlanRequest(NamedTuple):
    """What panels are planned for."""

    m: int
    n: int
    d: int
    dtype: torch.dtype  # of the features, after autocast
    device_type: str
    backend: str
    grads: GradMask = GradMask()
    filters_negatives: bool = False  # negatives are selected, or counted
    weighted: bool = False  # pairs have weights
    image_losses: bool = False  # the images' losses are wanted
    # The sweep copies rows before use, whatever D: padding must be blanked out, or the features'
    # strides do not suit the backend.
    copies_operands: bool = False
    multiprocessors: int | None = None  # of a GPU
    workspace_bytes: int | None = None  # the caller's bound


def plan_panels(request: PlanRequest) -> PanelPlan:
    """Choose the panels: a pure function of its argument; asks no device anything.

    Panels are as square as the budget allows, since every panel reads and writes its rows of dX and
    its columns of dY once: that traffic is proportional to 1/rows + 1/cols. On a GPU the sides are
    then cut back to where the products dX and dY fill whole waves of its ``multiprocessors``;
    elsewhere they are evened out, so that the last panel is not a sliver.

    Raises ValueError when ``workspace_bytes`` cannot hold one tile.
    """
    half_products = multiplies_half_into_fp32(request.device_type)
    return _plan(request, panel_class(request.backend), half_products)


@functools.lru_cache(maxsize=256)  # steps of a training ask for the same plan again
def _plan(
    request: PlanRequest,
    panel: type[Panel],
    half_products: bool,  # half operands, accumulated in fp32
) -> PanelPlan:
    m, n, d, dtype = request[:4]
    acc = accumulate_dtype(dtype)
    # Where the library products cannot take half operands and accumulate in fp32 (Triton's own
    # can), a panel's rows and columns are converted when it is their turn.
    converts = request.backend != "triton" and not half_products
    operand_dtype = acc if converts else dtype
    operand_dim = ceil_div(d, panel.align) * panel.align
    grads = request.grads

    def spec(rows: int, cols: int) -> PanelSpec:
        return PanelSpec(
            rows, cols, operand_dtype, grads.image or grads.text, grads.scalars,
            request.filters_negatives, n > d, request.weighted, request.image_losses,
        )  # fmt: skip

    def workspace(rows: int, cols: int) -> int:
        return panel.workspace_bytes(spec(rows, cols))

    rows, cols = _panel_shape(request, panel.tile, workspace)
    used = workspace(rows, cols)
    peak = used + (grads.image * m + grads.text * n) * d * acc.itemsize
    if request.copies_operands or operand_dim != d or operand_dtype != dtype:
        peak += (rows + cols) * operand_dim * operand_dtype.itemsize
    return PanelPlan(spec(rows, cols), operand_dim, acc, used, peak)


def _panel_shape(
    request: PlanRequest, tile: tuple[int, int], workspace: Callable[[int, int], int]
) -> tuple[int, int]:
    """Rows and columns of a panel; ``workspace`` is what the backend takes for a panel's sides."""
    m, n, d = request[:3]
    budget = request.workspace_bytes
    if budget is None:
        budget = _DEFAULT_WORKSPACE.get(request.device_type, _DEFAULT_WORKSPACE_GPU)
    tile_m, tile_n = min(tile[0], max(m, 1)), min(tile[1], max(n, 1))
    tile_bytes = workspace(tile_m, tile_n)
    if budget < tile_bytes:
        raise ValueError(
            f"workspace_bytes={budget} cannot hold one {tile_m} x {tile_n} tile of the "
            f"{request.backend} backend: expected at least {tile_bytes}"
        )

    tiles = budget // tile_bytes
    side = math.isqrt(tiles)  # of a square of tiles: a backend may take less for many than for one
    while side < max(m, n) and workspace((side + 1) * tile_m, (side + 1) * tile_n) <= budget:
        side += 1
    tiles_m, tiles_n = max(ceil_div(m, tile_m), 1), max(ceil_div(n, tile_n), 1)

    def shape(tiles: int) -> tuple[int, int]:
        rows = min(tiles_m, max(math.isqrt(tiles), tiles // tiles_n))
        cols = min(tiles_n, tiles // rows)
        rows = min(_side(m, rows, tile_m, d, request.multiprocessors), m)
        return rows, min(_side(n, cols, tile_n, d, request.multiprocessors), n)

    rows, cols = shape(max(tiles, side * side))
    if workspace(rows, cols) > budget:
        rows, cols = shape(tiles)
    return rows, cols
