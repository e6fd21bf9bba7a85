"""Forms in which torch carries a loss that the fused one refuses, by the rows of
docs/transforms.md: see transforms.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import func
from torch.autograd import forward_ad, functional
from torch.utils.checkpoint import checkpoint

from support.transforms import (
    ARGUMENTS,
    UPSTREAM,
    W1,
    W2,
    B,
    Form,
    T,
    X,
    Y,
    each,
    grads,
    leaves,
    of,
)


def through_part(**options) -> Form:
    """The gradient in one weight, differentiated in another that it depends on."""

    def form(loss, wrap):
        w1, w2 = leaves(W1, W2)
        function = wrap(lambda w1, w2: loss(torch.tanh(X @ w1) @ w2, Y, 10.0, -10.0))
        (grad,) = torch.autograd.grad(function(w1, w2), w1, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), w2, **options)

    return form


def backward_through_part(loss, wrap):
    w1, w2 = leaves(W1, W2)
    value = wrap(lambda w1, w2: loss(torch.tanh(X @ w1) @ w2, Y, 10.0, -10.0))(w1, w2)
    (grad,) = torch.autograd.grad(value, w1, create_graph=True)
    grad.square().sum().backward(inputs=[w2])
    return w2.grad


def penalty(name: str) -> Form:
    """A gradient penalty: in one argument, and differentiated in all of them."""

    def form(loss, wrap):
        tensors = leaves()
        value = wrap(lambda *v: loss(*v))(*tensors)
        index = list(ARGUMENTS).index(name)
        (grad,) = torch.autograd.grad(value, tensors[index], create_graph=True)
        (value + grad.square().sum()).backward()
        return grads(tensors)

    return form


def maml(loss, wrap):
    (w,) = leaves(W1)
    function = wrap(lambda w: loss(X @ w, Y, T, B))
    (inner,) = torch.autograd.grad(function(w), w, create_graph=True)
    return torch.autograd.grad(function(w - 0.01 * inner), w)


def twice_checkpointed(loss, wrap):
    tensors = leaves()
    function = wrap(lambda *v: checkpoint(loss, *v, use_reentrant=False))
    (grad,) = torch.autograd.grad(function(*tensors), tensors[0], create_graph=True)
    return torch.autograd.grad(grad.square().sum(), tensors[1])


def product(kind: str) -> Callable[[str], Form]:
    def make(name: str) -> Form:
        value = ARGUMENTS[name]
        return lambda loss, wrap: getattr(functional, kind)(
            wrap(of(loss, name)), value, torch.ones_like(value)
        )

    return make


def functional_hessian(name: str) -> Form:
    return lambda loss, wrap: functional.hessian(wrap(of(loss, name)), ARGUMENTS[name])


def grad_of_grad(name: str) -> Form:
    def form(loss, wrap):
        def inner(v):
            return func.grad(of(loss, name))(v).square().sum()

        return wrap(func.grad(inner))(ARGUMENTS[name])

    return form


def mixed(loss, wrap):
    def inner(t):
        return func.grad(lambda x: loss(x, Y, t, B))(X).square().sum()

    return wrap(func.grad(inner))(T)


def jacrev_of_jacrev(loss, wrap):
    return wrap(func.jacrev(func.jacrev(of(loss, "t"))))(T)


def jvp(name: str) -> Form:
    def form(loss, wrap):
        value = ARGUMENTS[name]
        return wrap(lambda v: func.jvp(of(loss, name), (v,), (torch.ones_like(v),)))(value)

    return form


def jvp_of_grad(loss, wrap):
    return wrap(lambda v: func.jvp(func.grad(of(loss, "x")), (v,), (Y,)))(X)


def vjp_of_jvp(loss, wrap):
    def tangent(v):
        return func.jvp(of(loss, "x"), (v,), (Y,))[1]

    return wrap(lambda v: func.vjp(tangent, v)[1](UPSTREAM[1]))(X)


def forward_transform(transform: Callable) -> Callable[[str], Form]:
    return lambda name: lambda loss, wrap: wrap(transform(of(loss, name)))(ARGUMENTS[name])


def linearize(loss, wrap):
    return func.linearize(wrap(of(loss, "t")), T)[1](T)


def dual(name: str) -> Form:
    def form(loss, wrap):
        value = ARGUMENTS[name]
        with forward_ad.dual_level():
            tangent = torch.ones_like(value)
            out = wrap(of(loss, name))(forward_ad.make_dual(value, tangent))
            return forward_ad.unpack_dual(out).tangent

    return form


def dual_that_requires_grad(loss, wrap):
    (t,) = leaves(T)
    with forward_ad.dual_level():
        return wrap(of(loss, "t"))(forward_ad.make_dual(t, T))


def forward_jacobian(name: str) -> Form:
    return lambda loss, wrap: functional.jacobian(
        wrap(of(loss, name)), ARGUMENTS[name], vectorize=True, strategy="forward-mode"
    )


DOUBLE = "siglip_loss does not support double backward"
FORWARD = "siglip_loss does not support forward-mode differentiation"

# By row, the message and the forms.
REFUSED: dict[str, tuple[str, dict[str, Form]]] = {
    "second derivatives": (
        DOUBLE,
        {
            "through part": through_part(),
            "through part, allow_unused": through_part(allow_unused=True),
            "through part, materialize_grads": through_part(materialize_grads=True),
            "through part, backward(inputs=)": backward_through_part,
            "MAML": maml,
            "checkpoint": twice_checkpointed,
            **each(penalty, "penalty"),
            **each(product("hvp"), "hvp"),
            **each(product("vhp"), "vhp"),
            **each(functional_hessian, "functional.hessian"),
        },
    ),
    "`torch.func.grad` of `grad`, `jacrev` of `jacrev`": (
        DOUBLE,
        {
            **each(grad_of_grad, "grad of grad"),
            "grad in t of grad in x": mixed,
            "jacrev of jacrev": jacrev_of_jacrev,
        },
    ),
    "`torch.func.jvp`, `jacfwd`, `hessian`": (
        FORWARD,
        {
            **each(jvp, "jvp"),
            **each(forward_transform(func.jacfwd), "jacfwd"),
            **each(forward_transform(func.hessian), "hessian"),
            "jvp of grad": jvp_of_grad,
            "vjp of jvp": vjp_of_jvp,
        },
    ),
    "`torch.func.linearize`, `torch.autograd.forward_ad`": (
        FORWARD,
        {
            "linearize": linearize,
            **each(dual, "dual tensors"),
            "a dual tensor that requires grad": dual_that_requires_grad,
            **each(forward_jacobian, "jacobian in forward mode"),
        },
    ),
}
