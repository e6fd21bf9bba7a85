"""SigLipLoss beside open_clip's own class, called as open_clip calls it."""

import importlib.metadata
import importlib.util
import inspect

import pytest
import torch

from fused_siglip import SigLipLoss
from helpers import NAMES, error, make_inputs, oracle


@pytest.fixture(scope="module")
def open_clip_loss():
    """open_clip's loss module alone: it needs only torch, the whole package torchvision too."""
    try:
        files = importlib.metadata.files("open_clip_torch")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("open_clip_torch is not installed")
    (path,) = [f.locate() for f in files if str(f) == "open_clip/loss.py"]
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(loss, inputs):
    """As open_clip's trainer: the model's output dict and output_dict=True."""
    model_out = dict(zip(NAMES, inputs.tensors(), strict=True))
    losses = loss(**model_out, output_dict=True)
    assert list(losses) == ["contrastive_loss"]
    total = sum(losses.values())
    return [total.detach(), *torch.autograd.grad(total, inputs.tensors())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 70, 300])
def test_equals_open_clip(open_clip_loss, dtype, batch):
    theirs_inputs = make_inputs(batch, batch, 32, dtype)
    for name in NAMES[2:]:  # open_clip's parameters share the features' dtype
        scalar = getattr(theirs_inputs, name).detach().to(dtype).requires_grad_()
        setattr(theirs_inputs, name, scalar)
    ours = call(SigLipLoss(), theirs_inputs)
    theirs = call(open_clip_loss.SigLipLoss(), theirs_inputs)
    for a, e, x in zip(ours, theirs, oracle(theirs_inputs), strict=True):
        assert a.shape == e.shape
        # each is within its own rounding of the same number, and ours is the closer one
        assert error(a, x) <= max(error(e, x), 16 * torch.finfo(a.dtype).eps)
        assert error(e, x) <= 0.05


def test_constructor_and_forward_are_open_clips(open_clip_loss):
    def parameters(function):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    for method in ("__init__", "forward"):
        theirs = parameters(getattr(open_clip_loss.SigLipLoss, method))
        ours = parameters(getattr(SigLipLoss, method))
        assert ours[: len(theirs)] == theirs  # chunk_size, new on open_clip's main branch, follows


def test_plain_return_and_shape_1_parameters():
    inputs = make_inputs(12, 12, 8)
    loss = SigLipLoss()(*inputs.tensors())
    assert loss.shape == () and loss.requires_grad
    reshaped = [t.reshape(1) for t in inputs.tensors()[2:]]  # as under FSDP2
    assert torch.equal(SigLipLoss(chunk_size=4)(*inputs.tensors()[:2], *reshaped), loss)


def test_module_has_no_state():
    loss = SigLipLoss(False, 0, 1, "bidir")
    assert list(loss.parameters()) == [] and list(loss.buffers()) == []
    assert loss.state_dict() == {}
