"""torch's own checks of an operator and of a gradient, over the calls that the operator knows.

opcheck tests schema, autograd registration, the meta kernel and AOT dispatch. gradcheck compares
every element of the Jacobian with finite differences in float64; the slow form takes no shortcut.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import normalize

from fused_siglip import Easiest, Hardest, Random, siglip_loss

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1, 1), (5, 5), (20, 20))
NEEDS = tuple(itertools.product((True, False), repeat=3))  # gradients: images, texts, scalars
TRAINABLE = tuple(t for t in itertools.product((True, False), repeat=4) if any(t))


def named(flags: tuple[bool, ...]) -> str:
    """A letter g for each gradient that is asked for."""
    return "".join("-g"[flag] for flag in flags)


def make_inputs(m: int, n: int, dim: int = 6, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(m * 31 + n)
    features = [
        normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=-1)
        for rows in (m, n)
    ]
    scalar = torch.float64 if dtype == torch.float64 else torch.float32
    scalars = [torch.tensor(value, dtype=scalar) for value in (3.0, -1.0)]
    return [*(f.to(dtype) for f in features), *scalars]


def make_ids(m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Repeated ids, and from the third row on a row of padding."""
    image_ids, text_ids = torch.arange(m) // 2, torch.arange(n) // 2
    image_ids[2:3], text_ids[4:5] = -1, -1
    return image_ids, text_ids


def opcheck(
    inputs, ids=(None, None), negative_only=False, needs=(True,) * 3, negatives=None,
    reduction="mean", dtype=None, group=None, **options,
):  # fmt: skip
    name = "loss_and_grads" if group is None else "global_loss_and_grads"
    operator = getattr(torch.ops.fused_siglip, name).default
    rest = (None, "torch", group, None, reduction, negatives, 0.5, 7, dtype)
    arguments = (*inputs, *ids, negative_only, *needs, *rest)
    assert set(torch.library.opcheck(operator, arguments, **options).values()) == {"SUCCESS"}


@pytest.mark.parametrize("needs", NEEDS, ids=named)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_operator_for_each_dtype_and_gradients_asked_for(dtype, needs):
    opcheck(make_inputs(5, 5, dtype=dtype), needs=needs)


@pytest.mark.parametrize("negatives", [None, "random", "hardest", "easiest"])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operator_for_each_choice_of_pairs(shape, ids, negatives):
    opcheck(
        make_inputs(*shape, dtype=torch.float32),
        ids=make_ids(*shape) if ids else (None, None),
        negatives=negatives,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3)], ids=str)
def test_operator_for_rectangles(shape, reduction):
    inputs = make_inputs(*shape, dtype=torch.float32)
    opcheck(inputs, ids=make_ids(*shape), reduction=reduction)
    opcheck(inputs, negative_only=True, reduction=reduction)


@pytest.mark.parametrize("dtype", FLOATS[1:3], ids=str)
def test_operator_under_autocast(dtype):
    opcheck(make_inputs(5, 5, dtype=torch.float32), dtype=dtype)


@pytest.mark.parametrize("trainable", TRAINABLE, ids=named)
def test_operator_whose_inputs_require_grad(trainable):
    """Without the check that differentiates every output: two of them are gradients already."""
    inputs = make_inputs(5, 5, dtype=torch.float32)
    for tensor, required in zip(inputs, trainable, strict=True):
        tensor.requires_grad_(required)
    opcheck(
        inputs,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("negatives", [None, "random", "hardest", "easiest"])
@pytest.mark.parametrize("ids", [False, True])
def test_operator_of_a_group(ids, negatives):
    """A group of one rank. What several ranks exchange is tested in the package's own tests."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        opcheck(
            make_inputs(5, 5, dtype=torch.float32),
            ids=make_ids(5, 5) if ids else (None, None),
            negatives=negatives,
            group=dist.group.WORLD.group_name,
        )
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("trainable", TRAINABLE, ids=named)
@pytest.mark.parametrize("ids", [False, True])
def test_gradient_for_each_set_of_inputs(ids, trainable):
    inputs = [x.requires_grad_(t) for x, t in zip(make_inputs(6, 6), trainable, strict=True)]
    options = dict(zip(("image_ids", "text_ids"), make_ids(6, 6), strict=True)) if ids else {}
    assert torch.autograd.gradcheck(lambda *xs: siglip_loss(*xs, **options), inputs)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "negatives", [None, Random(0.5, seed=3), Hardest(0.5), Easiest(0.5)], ids=repr
)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (7, 3)], ids=str)
def test_gradient_for_each_choice_of_pairs(shape, negatives, reduction):
    inputs = [x.requires_grad_() for x in make_inputs(*shape)]
    image_ids, text_ids = make_ids(*shape)
    options = {"negatives": negatives, "reduction": reduction}
    options |= {"image_ids": image_ids, "text_ids": text_ids}
    assert torch.autograd.gradcheck(lambda *xs: siglip_loss(*xs, **options), inputs)


@pytest.mark.parametrize("scale, bias", [(0.0, 0.0), (10.0, -10.0), (30.0, 5.0)])
@pytest.mark.parametrize("shape", [(5, 5), (3, 7)], ids=str)
def test_gradient_of_a_block_of_negatives(shape, scale, bias):
    features = make_inputs(*shape)[:2]
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (scale, bias)]
    inputs = [x.requires_grad_() for x in (*features, *scalars)]
    assert torch.autograd.gradcheck(lambda *xs: siglip_loss(*xs, negative_only=True), inputs)
