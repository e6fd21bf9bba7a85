"""Sweeps that compare similarities: best positives, and the negatives that are not below them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .kernels import Ids, Pairs, Panel, RowValues, aligned, aligned_vector, panel_class
from .planner import PlanRequest, plan_panels
from .spec import NO_GRADS, Execution

# A launch of so many pairs keeps a GPU busy, a copy of so many rows is small, and in float32 the
# counts of a panel are exact.
_LARGEST_SIDE = 1 << 14


class ScoreSweep:
    """Images of this process against texts as they come, all in panels of one shape.

    The shape depends on the largest numbers of rows alone, so that the ranks of a group have the
    same: equal pairs then have equal bits on all of them.
    """

    def __init__(
        self,
        x: Tensor,  # (M, D)
        image_ids: Tensor | None,  # (M,)
        most_images: int,
        most_texts: int,
        run: Execution,
    ):
        self.panel_class = panel_class(run.backend)
        self.x, self.align = x, self.panel_class.align
        self.image_ids = None if image_ids is None else aligned_vector(image_ids, self.align)
        tile_m, tile_n = self.panel_class.tile
        m, n = (
            min(max(-(-rows // tile), 1) * tile, _LARGEST_SIDE)
            for rows, tile in ((most_images, tile_m), (most_texts, tile_n))
        )
        plan = plan_panels(
            PlanRequest(
                m, n, x.shape[1], x.dtype, x.device.type, run.backend, NO_GRADS,
                copies_operands=True, workspace_bytes=run.workspace_bytes,
            )
        )  # fmt: skip
        self.spec, self.operand_dim = plan.panel, plan.operand_dim
        if image_ids is None:  # square, so that the diagonal is in panels of its own
            side = min(plan.rows, plan.cols)
            self.spec = self.spec._replace(rows=side, cols=side)
        self._panel: Panel | None = None

    @property
    def panel(self) -> Panel:
        """The memory and the functions of one panel; none is needed where there are no pairs."""
        if self._panel is None:
            self._panel = self.panel_class(self.spec, self.x.device)
        return self._panel

    def best_positives(
        self,
        y: Tensor,  # (n, D)
        text_ids: Tensor,  # (n,)
        best: RowValues,  # (M,), (n,)
    ) -> None:
        """Raise the best positives, by id, of all images and these texts."""
        for rows, x in self._rows():
            for cols, y_block, ids in self._cols(y, text_ids, slice(0, len(y))):
                pairs = self._pairs(rows, ids)
                self.panel.best_positives(x, y_block, pairs, best.block(rows, cols))

    def diagonal(
        self,
        y: Tensor,  # (M, D) texts of these images
        best: RowValues,  # (M,), (M,), raised
        counts: RowValues,  # (M,), (M,), added to
    ) -> None:
        """The best positives where text i belongs to image i, and the counts of these panels."""
        for rows, x in self._rows():
            (_, y_block, _), *_ = self._cols(y, None, rows)
            here = best.block(rows, rows)
            self.panel.best_positives(x, y_block, Pairs(0), here)
            restore_infinity(here)
            self.panel.count_not_below(
                x, y_block, Pairs(0), here, counts.block(rows, rows), same_panel=True
            )

    def best_on_diagonal(
        self,
        y: Tensor,  # (M, D) texts of these images
        best: RowValues,  # (M,), (M,), raised
    ) -> None:
        """The best positives where text i belongs to image i."""
        for rows, x in self._rows():
            (_, y_block, _), *_ = self._cols(y, None, rows)
            self.panel.best_positives(x, y_block, Pairs(0), best.block(rows, rows))

    def count_not_below(
        self,
        y: Tensor,  # (n, D)
        text_ids: Tensor | None,  # (n,)
        best: RowValues,  # (M,), (n,)
        counts: RowValues,  # (M,), (n,), added to
        own: slice | None = None,  # texts whose panels on the diagonal have been counted
    ) -> None:
        """Count the negatives of all images and these texts that are not below the best."""
        n = len(y)
        parts = [slice(0, n)]
        if own is not None:
            parts = [slice(0, own.start), own, slice(own.stop, n)]
        for rows, x in self._rows():
            for part in parts:
                for cols, y_block, ids in self._cols(y, text_ids, part):
                    if part is own and cols.start - own.start == rows.start:
                        continue
                    pairs = self._pairs(rows, ids)
                    self.panel.count_not_below(
                        x, y_block, pairs, best.block(rows, cols), counts.block(rows, cols)
                    )

    def _pairs(self, rows: slice, text_ids: Tensor | None) -> Pairs:
        """By id; without, those off the diagonal's panels: none is positive."""
        if self.image_ids is None or text_ids is None:
            return Pairs()
        return Pairs(None, Ids(self.image_ids[rows], text_ids))

    def _rows(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.x), self.spec.rows):
            rows = slice(start, min(start + self.spec.rows, len(self.x)))
            yield rows, self._operand(self.x[rows])

    def _cols(
        self, y: Tensor, text_ids: Tensor | None, part: slice
    ) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Blocks of some of the texts: which they are, features and ids."""
        for start in range(part.start, part.stop, self.spec.cols):
            cols = slice(start, min(start + self.spec.cols, part.stop))
            ids = None if text_ids is None else aligned_vector(text_ids[cols], self.align)
            yield cols, self._operand(y[cols]), ids

    def _operand(self, features: Tensor) -> Tensor:  # (m, D) -> (m, operand_dim)
        """Some rows as they enter the products, with zeros beyond D."""
        dtype, d = self.spec.dtype, features.shape[1]
        if d == self.operand_dim and aligned(features, self.align):
            return features.to(dtype)
        copy = features.new_zeros(len(features), self.operand_dim, dtype=dtype)
        copy[:, :d] = features
        return copy


def restore_infinity(best: RowValues) -> None:
    """Replace the lowest number, which panels take for -inf, by what it stands for."""
    for values in best:
        if values is not None:
            values.masked_fill_(values <= torch.finfo(values.dtype).min, -torch.inf)


def new_best(rows: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Best positives of rows that have none yet."""
    return like.new_full((rows,), -torch.inf, dtype=dtype)
