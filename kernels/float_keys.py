"""Floats as whole numbers that sort as they do: histograms of scores count by them."""

from __future__ import annotations

import torch
from torch import Tensor

# A key, in [0, 2^KEY_BITS), is the sign of a value, the last five bits of its exponent and the
# first 14 of its mantissa: values are told apart to 2^-14 of themselves, however small most of them
# are beside a few. It says all of values from 2^-30 up to (not including) 2.
KEY_BITS = 20
MANTISSA_BITS = 14
HALF = 2 ** (KEY_BITS - 1)  # keys of either sign

# integer type of the same width, bits of the mantissa, bias of the exponent
FORMATS = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}


def key_format(dtype: torch.dtype) -> tuple[int, int]:
    """The shift and the offset that make a key of a float's bits.

    A value >= 0 has the key HALF + min(max((bits >> shift) - offset, 0), HALF - 1); one below 0 has
    HALF - 1 minus as much. ``offset`` is what 2^-31 leaves after the shift.
    """
    _, mantissa, bias = FORMATS[dtype]
    return mantissa - MANTISSA_BITS, ((bias + 1) << MANTISSA_BITS) - HALF


def exact_keys(values: Tensor) -> Tensor:  # the integer type of the same width
    """Whole numbers that sort as the values do, and NaN last: what a maximum over ranks needs."""
    bits = values.view(FORMATS[values.dtype][0])
    last = torch.iinfo(bits.dtype).max
    return torch.where(values.isnan(), last, bits ^ (bits >> (8 * bits.itemsize - 1) & last))


def exact_values(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of exact keys."""
    last = torch.iinfo(keys.dtype).max
    return (keys ^ (keys >> (8 * keys.itemsize - 1) & last)).view(dtype)


def key_to_float(keys: Tensor, dtype: torch.dtype) -> Tensor:  # (M,) int64 -> (M,)
    """The smallest value with at least this key; -inf for key 0."""
    shift, offset = key_format(dtype)
    above = keys - HALF  # of a value below 0: ~magnitude
    bits = torch.where(
        above >= 0,
        torch.where(above > 0, (above + offset) << shift, 0),
        ((~above + 1 + offset) << shift) - 1,  # the last before the next larger magnitude
    )
    values = bits.to(FORMATS[dtype][0]).view(dtype)
    return torch.where(above >= 0, values, -values).masked_fill(keys == 0, -torch.inf)
