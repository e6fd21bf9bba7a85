"""What open_clip's tests of its chunked SigLIP loss hold, asked of this package's class.

No source distribution has those tests, so their facts are written here anew, with open_clip's
installed class and float64 as the references. As in them, ``_loss`` is the loss of one block.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from open_clip.loss import SigLipLoss as TheirLoss
from torch import Tensor
from torch.nn.functional import normalize

from fused_siglip import SigLipLoss
from fused_siglip.testing import eager_siglip_loss

CHUNKS = (0, 1, 7, 32, 64)  # rows; 0 is open_clip's loss without chunks


def make_inputs(images: int, texts: int, dim: int = 32, dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(rows, dim, generator=generator) for rows in (images, texts)]
    scalars = [torch.tensor(10.0), torch.tensor(-10.0)]
    return [*(normalize(f, dim=-1).to(dtype) for f in features), *(s.to(dtype) for s in scalars)]


def loss_and_grads(loss, inputs: list[Tensor], trainable=(True,) * 4, **options) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(t) for x, t in zip(inputs, trainable, strict=True)]
    value = loss(*leaves, **options)
    return [value.detach(), *torch.autograd.grad(value, [x for x in leaves if x.requires_grad])]


def assert_all_close(actual, expected, rtol=1e-5, atol=1e-5):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("negative_only", [False, True])
@pytest.mark.parametrize("batch", [64, 70])
@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_block_is_theirs_for_any_chunk_size(chunk_size, batch, negative_only):
    inputs = make_inputs(batch, batch)
    ours = SigLipLoss(chunk_size=chunk_size)._loss
    actual = loss_and_grads(ours, inputs, negative_only=negative_only)
    assert_all_close(actual, loss_and_grads(TheirLoss()._loss, inputs, negative_only=negative_only))


@pytest.mark.parametrize(
    "trainable",
    [t for t in itertools.product([True, False], repeat=4) if any(t)],
    ids=lambda t: "".join("-g"[x] for x in t),
)
@pytest.mark.parametrize("negative_only", [False, True])
def test_frozen_inputs_leave_the_other_gradients_alone(trainable, negative_only):
    inputs = make_inputs(19, 19)
    exact = [x.double() for x in inputs]
    actual = loss_and_grads(SigLipLoss()._loss, inputs, trainable, negative_only=negative_only)
    assert_all_close(
        actual, loss_and_grads(eager_siglip_loss, exact, trainable, negative_only=negative_only)
    )


@pytest.mark.parametrize("images, texts", [(19, 11), (11, 19)])
def test_rectangular_block_of_negatives(images, texts):
    inputs = make_inputs(images, texts)
    exact = [x.double() for x in inputs]
    actual = loss_and_grads(SigLipLoss()._loss, inputs, negative_only=True)
    assert_all_close(actual, loss_and_grads(eager_siglip_loss, exact, negative_only=True))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_blocks_add_up_to_the_loss_of_all_texts(world_size):
    """An own block with positives, and a block of negatives for every other rank's texts."""
    batch = 7
    image, text, scale, bias = make_inputs(batch, batch * world_size, dim=5)
    labels = -torch.ones(batch, batch * world_size, dtype=torch.float64)
    labels[:, :batch].fill_diagonal_(1)

    def blocks(image, text, scale, bias):
        own, *others = text.split(batch)
        loss = SigLipLoss()._loss
        remote = [loss(image, other, scale, bias, negative_only=True) for other in others]
        return loss(image, own, scale, bias) + sum(remote)

    def whole(image, text, scale, bias):
        logits = scale * image @ text.T + bias
        return -torch.nn.functional.logsigmoid(labels * logits).sum() / batch

    inputs = [image, text, scale, bias]
    exact = [x.double() for x in inputs]
    assert_all_close(loss_and_grads(blocks, inputs), loss_and_grads(whole, exact))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_and_a_bias_left_out(autocast, with_bias):
    inputs = make_inputs(35, 35)[: 4 if with_bias else 3]
    trainable = (True,) * len(inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = loss_and_grads(SigLipLoss()._loss, inputs, trainable)
        theirs = loss_and_grads(TheirLoss()._loss, inputs, trainable)
    # under autocast their logits are rounded to bfloat16, and ours are not
    assert_all_close(ours[:1], theirs[:1], rtol=5e-3 if autocast else 1e-5)
    assert_all_close(ours[1:], theirs[1:], rtol=2e-2, atol=5e-2 if autocast else 1e-5)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_no_grad_builds_no_graph(requires_grad):
    inputs = [x.requires_grad_(requires_grad) for x in make_inputs(19, 19)]
    with torch.no_grad():
        actual = SigLipLoss(chunk_size=7)(*inputs, output_dict=True)
        expected = TheirLoss()(*inputs, output_dict=True)
    assert list(actual) == list(expected)
    assert not actual["contrastive_loss"].requires_grad
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "trainable",
    [(True,) * 4, (False, False, True, True), (False, False, True, False)],
    ids=["all", "scalars", "scale"],
)
def test_no_matrix_of_pairs_waits_for_backward(trainable):
    batch, dim = 256, 16
    inputs = make_inputs(batch, batch, dim)
    leaves = [x.requires_grad_(t) for x, t in zip(inputs, trainable, strict=True)]
    own = {x.untyped_storage().data_ptr() for x in leaves}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = SigLipLoss()._loss(*leaves)
    # the gradients of both towers, and a few scalars
    assert sum(saved.values()) <= 2 * batch * dim * 4 + 4096
    loss.backward()
    assert all(x.grad.isfinite().all() for x in leaves if x.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_does_not_overflow(dtype):
    """65536 pairs of loss 10 each: a sum in float16 would be infinite."""
    batch = 256
    constant = [torch.zeros(batch, 4, dtype=dtype), torch.zeros(batch, 4, dtype=dtype)]
    constant += [torch.ones((), dtype=dtype), torch.full((), 10.0, dtype=dtype)]
    loss = SigLipLoss()._loss(*constant)
    assert loss.dtype == torch.float32
    exact = eager_siglip_loss(*(x.double() for x in constant))
    torch.testing.assert_close(loss.double(), exact, rtol=2e-4, atol=0)

    _, *grads = loss_and_grads(SigLipLoss()._loss, make_inputs(96, 96, 8, dtype))
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)
