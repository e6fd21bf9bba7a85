"""Scale and bias of LearnableSigLipLoss: shape, precision, bound, and where they come to life."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from fused_siglip import LearnableSigLipLoss
from fused_siglip.testing import eager_siglip_loss
from support.inputs import make_inputs

NAMES = ("logit_scale", "logit_bias")


def exact_loss(x, y, log_scale: float, bias: float, bound: float = math.inf) -> float:
    t = min(math.exp(log_scale), bound)
    return eager_siglip_loss(x.double(), y.double(), t, bias).item()


def features(dtype=torch.float32):
    return [f.detach().to(dtype) for f in make_inputs(24, 24, 16).tensors()[:2]]


def values(loss) -> list[float]:
    return [getattr(loss, name).item() for name in NAMES]


class Model(nn.Module):
    """A tower with the loss inside."""

    def __init__(self, **options):
        super().__init__()
        self.tower = nn.Linear(16, 16)
        self.loss = LearnableSigLipLoss(**options)

    def reset_parameters(self):
        pass


# --- precision ---

CASTS = {
    "bfloat16()": lambda m: m.bfloat16(),
    "half()": lambda m: m.half(),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(device, float16)": lambda m: m.to("cpu", torch.float16),
    "type(bfloat16)": lambda m: m.type(torch.bfloat16),
    "float() and bfloat16()": lambda m: m.float().bfloat16(),
    "double() and half()": lambda m: m.double().half(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("inside", [False, True])
def test_half_precision_leaves_them_in_float32(cast, inside):
    start = {"init_logit_scale": 4.78125, "init_logit_bias": -16.5}
    module = cast(Model(**start) if inside else LearnableSigLipLoss(**start))
    loss = module.loss if inside else module
    assert {getattr(loss, name).dtype for name in NAMES} == {torch.float32}
    if inside:
        assert module.tower.weight.dtype in (torch.bfloat16, torch.float16)
    x, y = features(torch.bfloat16)
    exact = exact_loss(x, y, 4.78125, -16.5)
    assert loss(x, y).item() == pytest.approx(exact, rel=1e-5)


def test_a_cast_keeps_gradients_and_float64_is_a_choice():
    loss = LearnableSigLipLoss()
    loss(*features()).backward()
    before = loss.logit_scale.grad.clone()
    loss.bfloat16()
    assert torch.equal(loss.logit_scale.grad, before)
    assert loss.double().logit_scale.dtype == torch.float64 == loss.factor().dtype
    assert loss.float().logit_scale.dtype == torch.float32


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_made_in_float32_whatever_the_default_dtype(default):
    old = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        loss = LearnableSigLipLoss(4.78125, -16.3)
    finally:
        torch.set_default_dtype(old)
    assert {getattr(loss, name).dtype for name in NAMES} == {torch.float32}
    assert values(loss) == pytest.approx([4.78125, -16.3], rel=1e-7)


@pytest.mark.parametrize("cast", [lambda m: m, lambda m: m.bfloat16(), lambda m: m.half()])
def test_they_move_under_adamw_after_a_cast(cast):
    x, y = features()
    losses = LearnableSigLipLoss(), cast(LearnableSigLipLoss())
    for loss in losses:
        optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-3, weight_decay=0.0)
        for _ in range(50):
            optimizer.zero_grad()
            loss(x, y).backward()
            optimizer.step()
    assert values(losses[0]) == values(losses[1])
    assert abs(losses[0].logit_bias.item() + 10) > 0.04


def test_a_scale_that_something_else_rounded_is_named():
    """FSDP's mixed precision hands the forward pass a bfloat16 scale: exp is float32 even so."""
    loss = LearnableSigLipLoss(4.78125, -16.5)
    loss.logit_scale.data = loss.logit_scale.data.bfloat16()
    x, y = features()
    with pytest.warns(UserWarning, match="logit_scale is torch.bfloat16 here"):
        value = loss(x, y)
    assert value.item() == pytest.approx(exact_loss(x, y, 4.78125, -16.5), rel=1e-5)


# --- shape ---


def test_shape_and_checkpoints_from_before():
    old = {"loss.logit_scale": torch.tensor(1.5), "loss.logit_bias": torch.tensor(-3.0)}
    tower = {name: v for name, v in Model().state_dict().items() if name.startswith("tower")}
    for assign in (False, True):
        model = Model()
        model.load_state_dict(old | tower, assign=assign)
        assert values(model.loss) == [1.5, -3.0]
        assert model.loss.logit_scale.shape == model.loss.logit_bias.shape == (1,)
    assert old["loss.logit_scale"].shape == ()  # the caller's own
    low = {name: value.bfloat16() for name, value in old.items()} | tower
    model.load_state_dict(low, assign=True)
    assert model.loss.logit_bias.dtype == torch.float32
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.loss.load_state_dict({name: torch.ones(2) for name in NAMES})
    with pytest.raises(RuntimeError, match="Missing key"):
        model.loss.load_state_dict({})


# --- the bound ---


@pytest.mark.parametrize("start", [100.0, 89.0, 1e4, math.log(100), 10.0])
def test_the_bound_is_of_t_prime(start):
    """exp(t') would overflow: its gradient was inf, and one step made t' -inf."""
    loss = LearnableSigLipLoss(start, -10.0, max_logit_scale=100.0)
    assert loss.factor().item() <= 100.0
    x, y = features()
    y = y.roll(1, 0)  # what is alike is no pair: a smaller scale is better
    loss(x, y).backward()
    t = torch.tensor(math.log(100), dtype=torch.float64, requires_grad=True)
    eager_siglip_loss(x.double(), y.double(), t.exp(), -10.0).backward()
    assert loss.logit_scale.grad.item() == pytest.approx(t.grad.item(), rel=1e-4)
    torch.optim.SGD(loss.parameters(), lr=0.1).step()
    assert math.isfinite(loss.logit_scale.item()) and loss.logit_scale.item() < start


@pytest.mark.parametrize("bound", [5, 7.0, 0.3, 1e-3, 99.99999, 3e38])
def test_the_factor_never_exceeds_the_bound(bound):
    loss = LearnableSigLipLoss(math.log(bound), max_logit_scale=bound)
    for shift in (-1e-6, 0.0, 1e-6, 1.0, 1e3):
        with torch.no_grad():
            loss.logit_scale.fill_(math.log(bound) + shift)
        assert loss.factor().item() <= torch.tensor(bound, dtype=torch.float32).item()
    assert loss.double().factor().item() == bound


def test_a_bound_of_infinity_is_none_and_a_start_must_fit():
    assert LearnableSigLipLoss(2.0, max_logit_scale=math.inf).factor().item() == pytest.approx(
        math.exp(2.0)
    )
    for options in ({}, {"max_logit_scale": 1e39}, {"max_logit_scale": math.inf}):
        with pytest.raises(ValueError, match=r"init_logit_scale is 100.*at most 88\.7"):
            LearnableSigLipLoss(100, **options)


# --- deferred initialisation ---


def poisoned(model: nn.Module, how) -> nn.Module:
    """What memory may hold: freed blocks full of another number, which empty tensors then get."""
    garbage = [torch.full((1,), 1234.5) for _ in range(64)]
    del garbage
    return how(model)


DEFERRED = {
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "to_empty, reset": lambda m: [m.to_empty(device="cpu"), m.loss.reset_parameters()][0],
    "bfloat16, to_empty": lambda m: m.bfloat16().to_empty(device="cpu"),
    "copied, to_empty": lambda m: copy.deepcopy(m).to_empty(device="cpu"),
}


@pytest.mark.parametrize("how", DEFERRED.values(), ids=DEFERRED)
def test_from_the_meta_device(how):
    for _ in range(5):
        with torch.device("meta"):
            model = Model(init_logit_scale=1.25, init_logit_bias=-4.5)
        assert model.loss.logit_scale.is_meta
        model = poisoned(model, how)
        assert values(model.loss) == [1.25, -4.5]
        assert model.loss.logit_scale.dtype == torch.float32


def test_on_the_meta_device_there_is_no_loss():
    loss = LearnableSigLipLoss().to("meta")
    with pytest.raises(ValueError, match="logit_scale is on the meta device"):
        loss(*features())


def test_loaded_over_the_meta_device():
    with torch.device("meta"):
        model = Model()
    saved = Model(init_logit_scale=0.5, init_logit_bias=-1.0).state_dict()
    model.load_state_dict(saved, assign=True)
    assert values(model.loss) == [0.5, -1.0]
    model.loss._is_hf_initialized = True  # unasked for, transformers' mark changes nothing
    assert values(model.loss) == [0.5, -1.0]


def test_reset_parameters():
    loss = LearnableSigLipLoss(1.0, -2.0)
    with torch.no_grad():
        loss.logit_scale.fill_(7.0), loss.logit_bias.fill_(7.0)
    loss.reset_parameters()
    assert values(loss) == [1.0, -2.0]
    assert loss.logit_scale.requires_grad


def test_a_cast_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LearnableSigLipLoss().bfloat16()(*features(torch.bfloat16))
