"""What all parts of a panel of the torch backend begin with: similarities, and who is positive."""

from __future__ import annotations

import torch
from torch import Tensor

from .interface import Pairs
from .torch_workspace import Workspace


class TorchSimilarities:
    """The part of a panel that the others build on."""

    workspace: Workspace
    strip_rows: int

    def _similarities(self, x: Tensor, y: Tensor) -> Tensor:  # (m, n)
        s = self.workspace.view("s", x.shape[0], y.shape[0])
        if x.dtype == s.dtype:
            return torch.mm(x, y.T, out=s)
        # half precision on a GPU: fp32 logits from half operands
        return torch.mm(x, y.T, out_dtype=s.dtype, out=s)

    def _positive(self, s: Tensor, pairs: Pairs) -> Tensor | int | None:
        """Which pairs are positive: (m, n) bool, the number of a diagonal, or None."""
        if pairs.ids is None:
            return pairs.diagonal
        # padding is -1 among images and -2 among texts: never a positive pair
        images = pairs.ids.images.clamp(min=-1)
        texts = torch.where(pairs.ids.texts < 0, -2, pairs.ids.texts)
        return torch.eq(images[:, None], texts, out=self.workspace.view("positive", *s.shape))
