"""SigLipLoss beside open_clip's own class, called as open_clip calls it."""

import importlib.metadata
import importlib.util
import inspect

import pytest
import torch

from fused_siglip import SigLipLoss
from support.inputs import NAMES, make_inputs
from support.processes import launch, returned
from support.tolerances import error, oracle


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


# --- subclasses, of either class ---


def calls_everything(base):
    class Calls(base):
        """As research code does: a forward of its own over the parts of open_clip's."""

        def forward(self, image_features, text_features, logit_scale, logit_bias, output_dict):
            x, y, t, b = image_features, text_features, logit_scale, logit_bias
            logits = self.get_logits(x, y, t, b)
            labels = self.get_ground_truth(x.device, x.dtype, len(x))
            none = self.get_ground_truth(x.device, x.dtype, len(x), negative_only=True)
            by_hand = -torch.nn.functional.logsigmoid(labels * logits).sum() / len(x)
            negative = self._loss(x, y.roll(1, 0), t, b, negative_only=True)
            loss = by_hand + 2 * self._loss(x, y, t, b) + 4 * negative + 0 * none.sum()
            return {"contrastive_loss": loss} if output_dict else loss

    return Calls


def overrides_labels(base):
    class Smoothed(base):
        def get_ground_truth(self, device, dtype, num_logits, negative_only=False):
            return 0.9 * super().get_ground_truth(device, dtype, num_logits, negative_only)

    return Smoothed


def overrides_logits(base):
    class Margin(base):
        def get_logits(self, image_features, text_features, logit_scale, logit_bias=None):
            return super().get_logits(image_features, text_features, logit_scale, logit_bias) - 0.5

    return Margin


def overrides_loss(base):
    class Weighted(base):
        def _loss(self, *args, **kwargs):
            return 3 * super()._loss(*args, **kwargs)

    return Weighted


def adds_to_forward(base):
    class Added(base):
        def forward(self, *args, output_dict=False, **kwargs):
            loss = super().forward(*args, **kwargs) + 1
            return {"contrastive_loss": loss} if output_dict else loss

    return Added


SUBCLASSES = [calls_everything, overrides_labels, overrides_logits, overrides_loss, adds_to_forward]


@pytest.mark.parametrize("subclass", SUBCLASSES)
def test_subclasses_compute_what_they_did(open_clip_loss, subclass):
    inputs = make_inputs(40, 40, 16, torch.float64)
    ours = call(subclass(SigLipLoss)(), inputs)
    theirs = call(subclass(open_clip_loss.SigLipLoss)(), inputs)
    for a, e in zip(ours, theirs, strict=True):
        assert error(a, e) <= 1e-13


def test_a_method_replaced_on_the_instance():
    inputs = make_inputs(10, 10, 8, torch.float64)
    loss = SigLipLoss()
    loss._loss = lambda *a, **k: 2 * SigLipLoss()._loss(*a, **k)
    assert loss(*inputs.tensors()).item() == pytest.approx(2 * oracle(inputs)[0].item())


def overriding_ranks(rank, world_size):
    inputs = make_inputs(6, 6, 8)
    for subclass in SUBCLASSES[1:4]:
        loss = subclass(SigLipLoss)(rank=rank, world_size=world_size)
        with pytest.raises(TypeError, match=r"overrides (get_|_loss).*open_clip's own SigLipLoss"):
            loss(*inputs.tensors())
    added = SUBCLASSES[4](SigLipLoss)(rank=rank, world_size=world_size)
    return added(*inputs.tensors()).item()


def test_what_several_ranks_do_not_call_is_refused():
    a, b = returned(launch(overriding_ranks, 2))
    assert a == pytest.approx(b)


def test_logits_without_a_bias():
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(SigLipLoss().get_logits(x, y, 10.0), 10.0 * x @ y.T)
