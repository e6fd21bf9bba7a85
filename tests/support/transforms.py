"""The forms in which torch carries a loss, by the rows of docs/transforms.md.

A form takes a loss and ``wrap``, which compiles a function or leaves it as it is, and returns the
tensors that the form is for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, func
from torch.autograd import functional, graph
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

Form = Callable[[Callable, Callable], object]

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


X, Y, OTHER = (torch.nn.functional.normalize(random(6, 5)) for _ in range(3))
T, B = torch.tensor(10.0, dtype=torch.float64), torch.tensor(-5.0, dtype=torch.float64)
ARGUMENTS = {"x": X, "y": Y, "t": T, "b": B}
W1, W2 = random(5, 5), random(5, 5)
UPSTREAM = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)


def same(function: Callable) -> Callable:
    """What takes the place of a compiler where nothing is compiled."""
    return function


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors or ARGUMENTS.values()]


def grads(tensors: list[Tensor]) -> list[Tensor]:
    return [t.grad for t in tensors]


def of(loss: Callable, name: str) -> Callable[[Tensor], Tensor]:
    """The loss as a function of one of its four arguments."""
    return lambda value: loss(*(ARGUMENTS | {name: value}).values())


def each(form: Callable[[str], Form], title: str) -> dict[str, Form]:
    return {f"{title} in {name}": form(name) for name in ARGUMENTS}


# --- exact ---


def backward(loss, wrap):
    tensors = leaves()
    wrap(lambda *v: loss(*v) * 3)(*tensors).backward()
    return grads(tensors)


def backward_twice(loss, wrap):
    tensors = leaves()
    value = wrap(lambda *v: loss(*v))(*tensors)
    first = torch.autograd.grad(value, tensors, retain_graph=True)
    return *first, *torch.autograd.grad(value, tensors)


def backward_into(loss, wrap):
    tensors = leaves()
    wrap(lambda *v: loss(*v))(*tensors).backward(inputs=tensors[1:3])
    return grads(tensors[1:3])


def one_tensor_twice(loss, wrap):
    (z,) = leaves(X)
    ids = torch.tensor([0, 1, 1, -1, 2, 3])
    wrap(lambda z: loss(z, z, T, B) + loss(z, z, T, B, image_ids=ids, text_ids=ids))(z).backward()
    return z.grad


def first_of_create_graph(loss, wrap):
    tensors = leaves()
    values = torch.autograd.grad(wrap(lambda *v: loss(*v))(*tensors), tensors, create_graph=True)
    return [v.detach() for v in values]


def in_the_factor(loss, wrap):
    """Of the gradient, the derivative in what multiplies the loss: the gradient is linear in it."""
    weight, *tensors = leaves(UPSTREAM[1], X, Y, T, B)
    value = weight * wrap(lambda *v: loss(*v))(*tensors)
    (grad,) = torch.autograd.grad(value, tensors[0], create_graph=True)
    return torch.autograd.grad(grad.square().sum(), weight)


def first_order_maml(loss, wrap):
    (w,) = leaves(W1)
    function = wrap(lambda w: loss(X @ w, Y, T, B))
    (inner,) = torch.autograd.grad(function(w), w)
    return torch.autograd.grad(function(w - 0.01 * inner), w)


def grad_of_all(loss, wrap):
    return wrap(func.grad(lambda *v: loss(*v), argnums=(0, 1, 2, 3)))(*ARGUMENTS.values())


def grad_and_value(loss, wrap):
    return wrap(func.grad_and_value(of(loss, "t")))(T)


def vjp(loss, wrap):
    return wrap(lambda v: func.vjp(of(loss, "x"), v)[1](UPSTREAM[1]))(X)


def jacrev(loss, wrap):
    return wrap(func.jacrev(lambda v: torch.stack([of(loss, "y")(v), of(loss, "y")(v * 2)])))(Y)


def grad_beside_no_grad(loss, wrap):
    def function(t):
        with torch.no_grad():
            constant = of(loss, "t")(t)
        return constant * t + of(loss, "t")(t)

    return wrap(func.grad(function))(T)


def functional_call(loss, wrap):
    tower = torch.nn.Linear(5, 5, dtype=torch.float64)
    with torch.no_grad():
        tower.weight.copy_(W1), tower.bias.copy_(W2[0])
    weights = {k: v.detach() for k, v in tower.named_parameters()}
    return wrap(func.grad(lambda w: loss(func.functional_call(tower, w, (X,)), Y, T, B)))(weights)


def vmap(loss, wrap):
    return wrap(func.vmap(of(loss, "x")))(torch.stack([X, OTHER]))


def vmap_last_axis(loss, wrap):
    return wrap(func.vmap(of(loss, "x"), in_dims=2))(torch.stack([X, OTHER], 2))


def vmap_of_grad(loss, wrap):
    function = func.grad(lambda x, t: loss(x, Y, t, B), argnums=(0, 1))
    return wrap(func.vmap(function))(torch.stack([X, OTHER]), torch.stack([T, T / 2]))


def grad_of_vmap(loss, wrap):
    several = torch.stack([X, OTHER])
    return wrap(func.grad(lambda t: func.vmap(lambda x: loss(x, Y, t, B))(several).sum()))(T)


def is_grads_batched(loss, wrap):
    tensors = leaves()
    value = wrap(lambda *v: loss(*v))(*tensors)
    return torch.autograd.grad(value, tensors, UPSTREAM, is_grads_batched=True)


def vectorized_jacobian(name: str) -> Form:
    return lambda loss, wrap: functional.jacobian(
        wrap(of(loss, name)), ARGUMENTS[name], vectorize=True
    )


def checkpointed(use_reentrant: bool) -> Form:
    def form(loss, wrap):
        tensors = leaves()
        function = wrap(lambda *v: checkpoint(loss, *v, use_reentrant=use_reentrant))
        function(*tensors).backward()
        return grads(tensors)

    return form


def under(context: Callable) -> Form:
    def form(loss, wrap):
        tensors = leaves()
        with context():
            wrap(lambda *v: loss(*v))(*tensors).backward()
        return grads(tensors)

    return form


def identity_hooks():
    return graph.saved_tensors_hooks(lambda t: t, lambda t: t)


def multi_grad_hook(loss, wrap):
    tensors, seen = leaves(), []
    value = wrap(lambda *v: loss(*v))(*tensors)
    with graph.register_multi_grad_hook(tensors, lambda values: seen.extend(values)):
        value.backward(retain_graph=True)
    return seen


def prehook(loss, wrap):
    tensors = leaves()
    value = wrap(lambda *v: loss(*v))(*tensors)
    value.grad_fn.register_prehook(lambda values: (values[0] * 2, *values[1:]))
    value.backward()
    return grads(tensors)


class Model(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.weight, self.loss = torch.nn.Parameter(W1.clone()), loss

    def forward(self, x, y):
        return self.loss(x @ self.weight, y, 10.0, -10.0)


def exported(strict: bool, decomposed: bool = False) -> Form:
    def form(loss, wrap):
        program = torch.export.export(Model(loss), (X, Y), strict=strict)
        if decomposed:
            program = program.run_decompositions({})
        model = program.module()
        model(X, Y).backward()
        return [p.grad for p in model.parameters()]

    return form


def traced(loss, wrap):
    function = make_fx(lambda *v: torch.autograd.grad(loss(*v), v))(*leaves())
    return function(*leaves(OTHER, Y, T, B))


EXACT: dict[str, dict[str, Form]] = {
    "`backward`, `torch.autograd.grad`": {
        "backward": backward,
        "backward twice": backward_twice,
        "backward(inputs=)": backward_into,
        "one tensor twice": one_tensor_twice,
        "first derivatives with create_graph": first_of_create_graph,
        "first-order MAML": first_order_maml,
    },
    "the gradient's derivative in a factor of the loss": {"factor": in_the_factor},
    "`torch.func.grad`, `vjp`, `jacrev`": {
        "grad": grad_of_all,
        "grad_and_value": grad_and_value,
        "vjp": vjp,
        "jacrev": jacrev,
        "grad beside no_grad": grad_beside_no_grad,
        "functional_call": functional_call,
    },
    "`torch.vmap`": {
        "vmap": vmap,
        "vmap over the last axis": vmap_last_axis,
        "vmap of grad": vmap_of_grad,
        "grad of vmap": grad_of_vmap,
    },
    "a batched backward (`is_grads_batched`, `jacobian(vectorize=True)`)": {
        "is_grads_batched": is_grads_batched,
        **each(vectorized_jacobian, "jacobian"),
    },
    "`torch.utils.checkpoint`": {
        "reentrant": checkpointed(True),
        "not reentrant": checkpointed(False),
    },
    "saved-tensor hooks, `save_on_cpu`": {
        "hooks": under(identity_hooks),
        "save_on_cpu": under(graph.save_on_cpu),
        "allow_mutation": under(graph.allow_mutation_on_saved_tensors),
    },
    "hooks on tensors and nodes": {"multi-grad hook": multi_grad_hook, "prehook": prehook},
    "`torch.export`, then training": {
        "strict": exported(True),
        "not strict": exported(False),
        "strict, decomposed": exported(True, True),
        "not strict, decomposed": exported(False, True),
    },
    "`make_fx`": {"make_fx": traced},
}
