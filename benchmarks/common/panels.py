"""All that the benchmarks use of the inside of a sweep: its plan, one panel alone, its products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_siglip.kernels import (
    BACKENDS,
    GRAD_SCALE,
    Affine,
    Pairs,
    Panel,
    PanelSpec,
    panel_class,
)
from fused_siglip.kernels.torch_products import add_product
from fused_siglip.planner import PanelPlan, plan_panels
from fused_siglip.spec import Execution, GradMask
from fused_siglip.sweep import plan_request

from .workloads import Inputs

PanelCall = Callable[[], tuple[Tensor, Tensor]]  # dlogits (m, n), and the three sums


def register(name: str, panel: type[Panel]) -> None:
    """Make a panel class a backend, for the rest of this process."""
    BACKENDS[name] = lambda: panel


def plan_of(inputs: Inputs, backend: str, workspace_bytes: int | None = None) -> PanelPlan:
    """The panels that the sweep will use."""
    run = Execution(backend, workspace_bytes)
    return plan_panels(plan_request(inputs.x, inputs.y, GradMask(), run))


def panel_call(
    inputs: Inputs,
    backend: str,
    *,
    diagonal: int = 0,
    side: int | None = None,  # of the panel's memory; by default that of the features
    unwritten: float | None = None,  # what its outputs hold before
) -> PanelCall:
    """A function that computes all pairs of the features in one panel."""
    x, y, t, b = inputs
    spec = PanelSpec(side or len(x), side or len(y), x.dtype, True, True)
    panel = panel_class(backend)(spec, x.device)
    sums = torch.zeros(3, device=x.device)
    if unwritten is not None:
        panel.dlogits.fill_(unwritten)
        sums.fill_(unwritten)

    def call() -> tuple[Tensor, Tensor]:
        return panel(x, y, Affine(t, b), Pairs(diagonal=diagonal), sums), sums

    return call


def gradient_products(
    dlogits: Tensor,  # (m, n)
    inputs: Inputs,
) -> dict[str, Callable[[], None]]:
    """The two products of a panel's gradients, as the sweep adds them up."""
    dx, dy = (torch.zeros(v.shape, device=v.device) for v in (inputs.x, inputs.y))
    alpha = 1.0 / GRAD_SCALE.get(inputs.x.dtype, 1.0)
    return {
        "dX product": lambda: add_product(dx, dlogits, inputs.y, alpha, accumulate=True),
        "dY product": lambda: add_product(dy, dlogits.T, inputs.x, alpha, accumulate=True),
    }
