"""Weighted losses and the losses of images under torch's transforms: right, or refused."""

import pytest
import torch
from torch import func
from torch.utils.checkpoint import checkpoint

from fused_siglip import PositiveWeight, siglip_loss
from fused_siglip.testing import eager_siglip_loss
from support.inputs import make_inputs, random_weights
from support.tolerances import error

pytestmark = [  # of torch itself
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop .* for aten..fill_diagonal_"),
]

OPTIONS = {"positives": PositiveWeight(0.3, 0.5, 0.2), "label_smoothing": 0.1}
UPSTREAM = torch.tensor([0.5, -1.0, 0.0, 2.0, -0.25, 1.0], dtype=torch.float64)


def six(requires_grad: bool = True) -> tuple[list[torch.Tensor], dict]:
    """Tensors of six pairs, and their ids and weights."""
    inputs = make_inputs(6, 6, 5, torch.float64, t=7.0, b=-1.0, requires_grad=(requires_grad,) * 4)
    ids = torch.tensor([0, 1, 1, -1, 2, 3]), torch.tensor([1, 0, 1, 2, -1, 2])
    rest = dict(zip(("image_ids", "text_ids"), ids, strict=True))
    return inputs.tensors(), rest | random_weights(inputs, torch.float64) | OPTIONS


def losses_of(loss, rest, **changed):
    return lambda *tensors: loss(*tensors, **(rest | {"reduction": "none"} | changed))


def assert_same(actual, expected):
    pairs = zip(*(torch.utils._pytree.tree_leaves(v) for v in (actual, expected)), strict=True)
    for a, e in pairs:
        assert a.shape == e.shape
        assert error(a, e) <= 1e-13


FUNC = {
    "grad": lambda f: func.grad(lambda *v: f(*v) @ UPSTREAM, argnums=(0, 1, 2, 3)),
    "vjp": lambda f: lambda *v: func.vjp(f, *v)[1](UPSTREAM),
    "jacrev": lambda f: func.jacrev(f, argnums=(0, 1, 2, 3)),
    "vmap": lambda f: (
        lambda x, y, t, b: func.vmap(lambda x: f(x, y, t, b))(torch.stack([x, x.flip(0)]))
    ),
    "vmap of grad": lambda f: (
        lambda x, y, t, b: func.vmap(func.grad(lambda x: f(x, y, t, b) @ UPSTREAM))(
            torch.stack([x, x.flip(0)])
        )
    ),
}


@pytest.mark.parametrize("transform", FUNC.values(), ids=FUNC)
def test_losses_of_images_under_torch_func(transform):
    tensors, rest = six(requires_grad=False)
    both = [transform(losses_of(f, rest))(*tensors) for f in (siglip_loss, eager_siglip_loss)]
    assert_same(*both)


def test_vmap_over_weights():
    (x, y, t, b), rest = six(requires_grad=False)
    weights = torch.rand(3, 6, dtype=torch.float64)

    def loss(a):
        return siglip_loss(x, y, t, b, **(rest | {"image_weights": a}))

    assert_same(func.vmap(loss)(weights), torch.stack([loss(a) for a in weights]))


def test_batched_backward_of_losses_of_images():
    tensors, rest = six()
    values = [losses_of(f, rest)(*tensors) for f in (siglip_loss, eager_siglip_loss)]
    rows = torch.stack([UPSTREAM, UPSTREAM.flip(0)])
    both = [torch.autograd.grad(v, tensors, rows, is_grads_batched=True) for v in values]
    assert_same(*both)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled(compiler, reduction):
    tensors, rest = six()
    rest |= {"reduction": reduction}

    def step(loss, *tensors):
        value = loss(*tensors, **rest)
        return value * UPSTREAM if reduction == "none" else value

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    values = [compiled(siglip_loss, *tensors), step(eager_siglip_loss, *tensors)]
    assert_same(*values)
    assert_same(*(torch.autograd.grad(v.sum(), tensors) for v in values))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_exported(reduction):
    tensors, rest = six()

    class Step(torch.nn.Module):
        def forward(self, x, y, t, b):
            return siglip_loss(x, y, t, b, **rest, reduction=reduction)

    values = [
        torch.export.export(Step(), tuple(tensors)).module()(*tensors),
        eager_siglip_loss(*tensors, **rest, reduction=reduction),
    ]
    assert_same(*values)
    assert_same(*(torch.autograd.grad(v.sum(), tensors) for v in values))


def test_nothing_is_compiled_again_for_another_batch():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def losses(x, y, a):
        return siglip_loss(
            x, y, 10.0, -10.0, image_weights=a, label_smoothing=0.1, reduction="none"
        )

    for n in (48, 32, 7):
        inputs = make_inputs(n, n, 8)
        losses(inputs.image_features, inputs.text_features, torch.rand(n)).sum().backward()
    assert counter.frame_count <= 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    tensors, rest = six()
    function = losses_of(siglip_loss, rest)
    expected = torch.autograd.grad(function(*tensors), tensors, UPSTREAM)
    checkpoint(function, *tensors, use_reentrant=reentrant).backward(UPSTREAM)
    assert all(torch.equal(v.grad, e) for v, e in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_retain_graph(reduction):
    tensors, rest = six()
    value = siglip_loss(*tensors, **rest, reduction=reduction)
    upstream = UPSTREAM if reduction == "none" else UPSTREAM[0]
    first = torch.autograd.grad(value, tensors, upstream, retain_graph=True)
    second = torch.autograd.grad(value, tensors, 2 * upstream)
    assert_same(second, [2 * v for v in first])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction):
    inputs = make_inputs(40, 40, 8)
    weights = random_weights(inputs)
    rounded = [t.detach().bfloat16() for t in inputs.tensors()[:2]]
    with torch.autocast("cpu", torch.bfloat16):
        value = siglip_loss(*inputs.tensors(), **weights, **OPTIONS, reduction=reduction)
    expected = siglip_loss(
        *rounded, *inputs.tensors()[2:], **weights, **OPTIONS, reduction=reduction
    )
    assert torch.equal(value, expected)
    value.sum().backward()
    assert inputs.image_features.grad.dtype == torch.float32
    expected.sum().backward()


DOUBLE, FORWARD = "does not support double backward", "does not support forward-mode"


def penalty(tensors, losses):
    (grad,) = torch.autograd.grad(losses.sum(), tensors[0], create_graph=True)
    grad.square().sum().backward()


def penalty_of_another(tensors, losses):
    (grad,) = torch.autograd.grad(losses.sum(), tensors[0], create_graph=True)
    torch.autograd.grad(grad.square().sum(), tensors[2])


def through_the_upstream_vector(tensors, losses):
    upstream = torch.ones_like(losses, requires_grad=True)
    (grad,) = torch.autograd.grad(losses, tensors[0], upstream, create_graph=True)
    torch.autograd.grad(grad.square().sum(), upstream)


@pytest.mark.parametrize("form", [penalty, penalty_of_another, through_the_upstream_vector])
def test_second_derivatives_are_refused(form):
    tensors, rest = six()
    with pytest.raises(RuntimeError, match=DOUBLE):
        form(tensors, losses_of(siglip_loss, rest)(*tensors))


def test_second_derivatives_of_weighted_pairs_are_refused():
    tensors, rest = six()
    with pytest.raises(RuntimeError, match=DOUBLE):
        penalty(tensors, siglip_loss(*tensors, **rest))


REFUSED = {
    "grad of grad": (DOUBLE, lambda f: func.grad(lambda v: func.grad(f)(v).square().sum())),
    "hessian": (FORWARD, func.hessian),
    "jacrev of jacrev": (DOUBLE, lambda f: func.jacrev(func.jacrev(f))),
    "jacfwd": (FORWARD, func.jacfwd),
    "jvp": (FORWARD, lambda f: lambda v: func.jvp(f, (v,), (v,))),
}


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("words,transform", REFUSED.values(), ids=REFUSED)
def test_refused_under_torch_func(words, transform, reduction):
    (x, *others), rest = six(requires_grad=False)

    def losses(v):
        return siglip_loss(v, *others, **rest, reduction=reduction) @ UPSTREAM

    def total(v):
        return siglip_loss(v, *others, **rest, reduction=reduction)

    with pytest.raises(RuntimeError, match=words):
        transform(losses if reduction == "none" else total)(x)
