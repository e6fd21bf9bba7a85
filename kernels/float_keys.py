"""Floats as whole numbers that sort as they do: histograms of logits count by them."""

from __future__ import annotations

import torch
from torch import Tensor

# A place, in [0, 2^PLACE_BITS), is the sign of a value, the last five bits of its exponent and the
# first 14 of its mantissa: values are told apart to 2^-14 of themselves, however small most of them
# are beside a few. It says all of values from 2^-30 up to (not including) 2.
PLACE_BITS = 20
KEPT_BITS = 14
HALF = 2 ** (PLACE_BITS - 1)  # places of either sign

# integer type of the same width, bits of the mantissa, bias of the exponent
FORMATS = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}


def cut(dtype: torch.dtype) -> tuple[int, int]:
    """How far a value's bits are shifted, and what is left of 2^-31: the place of a value >= 0 is
    HALF + min(max((bits >> shift) - lowest, 0), HALF - 1), of one below HALF - 1 minus as much."""
    _, mantissa, bias = FORMATS[dtype]
    return mantissa - KEPT_BITS, ((bias + 1) << KEPT_BITS) - HALF


def key_to_float(places: Tensor, dtype: torch.dtype) -> Tensor:  # (M,) int64 -> (M,)
    """The smallest value with at least this place; -inf for the lowest one."""
    shift, lowest = cut(dtype)
    above = places - HALF  # of a value below 0: ~magnitude
    bits = torch.where(
        above >= 0,
        torch.where(above > 0, (above + lowest) << shift, 0),
        ((~above + 1 + lowest) << shift) - 1,  # the last before the next larger magnitude
    )
    values = bits.to(FORMATS[dtype][0]).view(dtype)
    return torch.where(above >= 0, values, -values).masked_fill(places == 0, -torch.inf)
