"""How many kernels a step on one panel launches: what a small batch on a GPU takes its time for.

Counted in Triton's interpreter, on float32 features of one panel: every launch of a Triton kernel,
and every torch operation that would launch one.
"""

import os
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_siglip import Random, function, operator, siglip_loss
from support.inputs import make_inputs

ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


class Launches(TorchDispatchMode):
    """Counts kernels; refuses what a GPU would wait for."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = Counter()
        self.in_kernel = self.in_backward = False
        from triton.runtime.interpreter import GridExecutor

        run = GridExecutor.__call__

        def launch(executor, *args, **kwargs):
            self.names[executor.fn.__name__] += 1
            self.in_kernel = True
            try:
                return run(executor, *args, **kwargs)
            finally:
                self.in_kernel = False

        monkeypatch.setattr(GridExecutor, "__call__", launch)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        # backward asks a factor that is on a CPU whether it is 1, and only such a one
        asks = name == "_local_scalar_dense" and self.in_backward
        assert self.in_kernel or asks or name not in ("_local_scalar_dense", "nonzero"), name
        launches = not func.is_view and name not in ALLOCATIONS
        if (
            launches
            and not (self.in_kernel or asks)
            and isinstance(out, torch.Tensor)
            and out.numel()
        ):
            self.names[name] += 1
        return out


@pytest.fixture
def count(monkeypatch, backend):
    if backend != "triton" or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("counts what the Triton backend launches, in the interpreter")

    def counted(inputs, **options):
        call = dict(**inputs.ids, backend="triton", **options)
        # a step as it is without the mode that counts, for which backward would make copies
        for module in (operator, function):
            monkeypatch.setattr(module, "is_eager", lambda *tensors: True)
        with Launches(monkeypatch) as launches:
            loss = siglip_loss(*inputs.tensors(), **call)
            if loss.requires_grad:
                launches.in_backward = True
                loss.backward()
        monkeypatch.undo()
        return launches.names

    return counted


def test_a_full_step(count):
    names = count(make_inputs(200, 200, 32))
    assert names == Counter(
        panel_kernel=1,
        addmm=2,  # dX and dY, over t
        finish_kernel=1,  # the loss, dt, db and the factor of dX and dY
        ones_like=1,  # the upstream gradient, which is torch's own
        mul=1,  # dt, db and that factor, times upstream
        mul_=2,  # dX and dY
    )
    assert names.total() <= 9


@pytest.mark.parametrize(
    "requires_grad,most",
    [
        ((False, True, True, True), 6),
        ((True, True, False, False), 8),
        ((False, False, True, True), 4),
        ((False,) * 4, 2),
    ],
    ids=["image tower frozen", "scalars frozen", "towers frozen", "no gradient"],
)
def test_frozen_parts_launch_nothing(count, requires_grad, most):
    names = count(make_inputs(200, 200, 32, requires_grad=requires_grad))
    assert names.total() <= most, names


def test_sum_takes_as_many_as_mean(count):
    assert count(make_inputs(130, 130, 32), reduction="sum").total() <= 9


@pytest.mark.parametrize("what", ["ids", "random"])
def test_no_step_waits_for_the_device(count, what):
    """Whatever else it launches."""
    options = {"negatives": Random(0.5, 1)} if what == "random" else {}
    count(make_inputs(130, 130, 32, ids=what == "ids"), **options)
