"""LearnableSigLipLoss: the loss with a scale and a bias of its own."""

import copy
import math

import pytest
import torch

from fused_siglip import LearnableSigLipLoss, PositiveTarget, PositiveWeight, siglip_loss
from fused_siglip.testing import eager_siglip_loss
from support.inputs import loss_and_grads, make_inputs
from support.tolerances import assert_as_exact_as_eager


def test_starts_as_in_the_paper_and_gives_the_loss():
    inputs = make_inputs(40, 40, 16)
    loss = LearnableSigLipLoss()
    assert loss.factor().item() == pytest.approx(10.0, rel=1e-6)
    assert loss.logit_bias.item() == -10.0
    features = inputs.tensors()[:2]
    assert torch.equal(loss(*features), siglip_loss(*features, loss.factor(), loss.logit_bias))


def test_gradients_of_t_prime_and_b():
    inputs = make_inputs(40, 40, 16)
    loss = LearnableSigLipLoss(math.log(20), -3.0)
    loss(inputs.image_features.detach(), inputs.text_features.detach()).backward()
    t_prime = loss.logit_scale.detach().double().requires_grad_()
    b = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    features = [f.detach().double() for f in inputs.tensors()[:2]]
    eager_siglip_loss(*features, t_prime.exp(), b).backward()
    torch.testing.assert_close(loss.logit_scale.grad.double(), t_prime.grad, rtol=2e-6, atol=0)
    torch.testing.assert_close(loss.logit_bias.grad.double(), b.grad, rtol=2e-6, atol=0)


def test_ids_and_options_reach_the_loss():
    inputs = make_inputs(40, 30, 16, ids=True)
    loss = LearnableSigLipLoss(workspace_bytes=1 << 17, backend="torch")

    def call(x, y, t, b, **ids):
        loss.logit_scale.data.copy_(t.log())
        return loss(x, y, **ids)

    inputs.logit_scale.requires_grad_(False)
    inputs.logit_bias.requires_grad_(False)
    assert_as_exact_as_eager(loss_and_grads(call, inputs), inputs)
    with pytest.raises(ValueError, match="workspace_bytes=1 cannot hold one"):
        LearnableSigLipLoss(workspace_bytes=1)(*inputs.tensors()[:2], **inputs.ids)


SETTINGS = [
    {"positives": PositiveWeight(0, per_image=1)},
    {"positives": PositiveWeight(0.5, per_text=1.5), "label_smoothing": 0.1},
    {"positives": PositiveTarget(0, 0.5, 0.5)},
    {"label_smoothing": 0.2},
]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_pairs_are_worth(settings, reduction):
    inputs = make_inputs(40, 30, 16, torch.float64, ids=True)
    draw = torch.Generator().manual_seed(1)
    of_call = {
        "image_weights": torch.rand(40, generator=draw, dtype=torch.float64),
        "text_weights": torch.rand(30, generator=draw, dtype=torch.float64),
        "reduction": reduction,
    }
    upstream = torch.rand(40, generator=draw, dtype=torch.float64)
    loss = LearnableSigLipLoss(math.log(20), -3.0, **settings).double()
    ours = loss(*inputs.tensors()[:2], **inputs.ids, **of_call)
    t_prime, b = (p.detach().clone().requires_grad_() for p in loss.parameters())
    features = [f.detach().clone().requires_grad_() for f in inputs.tensors()[:2]]
    eager = eager_siglip_loss(*features, t_prime.exp(), b, **inputs.ids, **settings, **of_call)
    assert ours.shape == eager.shape == ((40,) if reduction == "none" else ())
    torch.testing.assert_close(ours, eager, rtol=1e-12, atol=1e-13)
    for value in (ours, eager):
        (value @ upstream if reduction == "none" else value).backward()
    actual = [*(f.grad for f in inputs.tensors()[:2]), *(p.grad for p in loss.parameters())]
    for a, e in zip(actual, (*features, t_prime, b), strict=True):
        torch.testing.assert_close(a, e.grad, rtol=1e-11, atol=1e-13)


def test_a_bound_holds_the_factor_and_lets_it_come_back():
    x = torch.eye(20)
    loss = LearnableSigLipLoss(math.log(10), max_logit_scale=5)
    assert loss.factor().item() == 5.0
    ids = {"image_ids": torch.arange(20), "text_ids": torch.arange(20)}
    loss(x, x, **ids).backward()  # pairs are alike: a larger factor would be better
    outward, loss.logit_scale.grad = loss.logit_scale.grad.item(), None
    ids["text_ids"] = ids["text_ids"].roll(1)
    loss(x, x, **ids).backward()  # what is alike is no pair: a smaller one
    assert outward == 0.0 and loss.logit_scale.grad.item() > 0.0
    torch.optim.SGD([loss.logit_scale], lr=100.0).step()
    assert loss.factor().item() < 5.0
    x = torch.nn.functional.normalize(torch.randn(20, 8))
    inside = LearnableSigLipLoss(math.log(50), max_logit_scale=100)
    inside(x, x).backward()
    assert inside.factor().item() == pytest.approx(50.0) and inside.logit_scale.grad.item() != 0.0


@pytest.mark.parametrize("bound", [None, 50.0, 5.0])
def test_under_torch_func(bound):
    x = torch.nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    loss = LearnableSigLipLoss(max_logit_scale=bound)
    loss(x, x).backward()
    parameters = dict(loss.named_parameters())
    grads = torch.func.grad(lambda p: torch.func.functional_call(loss, p, (x, x)))(parameters)
    for name, parameter in parameters.items():
        assert torch.equal(grads[name], parameter.grad)


def test_a_bound_under_torch_compile():
    x, y = (torch.nn.functional.normalize(torch.randn(20, 8)) for _ in range(2))
    eager, compiled = (LearnableSigLipLoss(max_logit_scale=5) for _ in range(2))
    torch._dynamo.reset()
    torch.compile(compiled, backend="aot_eager", fullgraph=True)(x, y).backward()
    eager(x, y).backward()
    assert torch.equal(compiled.logit_scale.grad, eager.logit_scale.grad)


def test_names_for_weight_decay_are_its_parameters():
    loss = LearnableSigLipLoss()
    assert loss.no_weight_decay() == {name for name, _ in loss.named_parameters()}


def test_state_is_saved_copied_and_loaded():
    loss = LearnableSigLipLoss(1.0, -2.0, max_logit_scale=50.0)
    assert list(loss.state_dict()) == ["logit_scale", "logit_bias"]
    again = LearnableSigLipLoss()
    again.load_state_dict(copy.deepcopy(loss).state_dict())
    assert again.logit_scale.item() == 1.0 and again.logit_bias.item() == -2.0


@pytest.mark.parametrize(
    "arguments,exception,words",
    [
        ({"init_logit_scale": "10"}, TypeError, "init_logit_scale is a str: expected a number"),
        ({"init_logit_bias": None}, TypeError, "init_logit_bias is a NoneType: expected a number"),
        ({"init_logit_scale": math.inf}, ValueError, "init_logit_scale is inf: expected a finite"),
        ({"init_logit_bias": math.nan}, ValueError, "init_logit_bias is nan: expected a finite"),
        ({"max_logit_scale": True}, TypeError, "max_logit_scale is a bool: expected a number or"),
        ({"positives": 2.0}, TypeError, "positives is a float: expected None, PositiveWeight("),
        ({"label_smoothing": "1"}, TypeError, "label_smoothing is a str: expected a number"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5: expected 0 to 1"),
        ({"max_logit_scale": 0}, ValueError, "max_logit_scale is 0: expected more than 0"),
    ],
)
def test_bad_constructor_call(arguments, exception, words):
    with pytest.raises(exception) as caught:
        LearnableSigLipLoss(**arguments)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "arguments,exception,words",
    [
        ({"image_weights": [1.0]}, TypeError, "image_weights is a list: expected None or a float"),
        ({"text_weights": torch.ones(3)}, ValueError, "text_weights has shape (3,): expected (4,)"),
        ({"image_weights": -torch.ones(4)}, ValueError, "image_weights has -1.0 in row 0"),
        ({"reduction": "all"}, ValueError, "reduction is 'all': expected "),
    ],
)
def test_bad_call(arguments, exception, words):
    x = torch.nn.functional.normalize(torch.randn(4, 8))
    with pytest.raises(exception) as caught:
        LearnableSigLipLoss()(x, x, **arguments)
    assert words in str(caught.value)
