"""Where tensors start: loads of full width want an address of so many bytes."""

from __future__ import annotations

import torch
from torch import Tensor

_VECTOR_BYTES = 16  # the widest load; Triton's launcher tells such addresses from others


def at_aligned_address(tensor: Tensor) -> bool:
    """Whether a tensor starts where a load of full width may."""
    return tensor.data_ptr() % _VECTOR_BYTES == 0


def aligned_vector(vector: Tensor, align: int) -> Tensor:  # (m,)
    """Ids or weights as a panel with this ``align`` reads them: adjacent, at such an address."""
    if align == 1 or (vector.is_contiguous() and at_aligned_address(vector)):
        return vector
    return vector.clone(memory_format=torch.contiguous_format)
