"""The plan and the sweep: panel shapes, the products that are done, the memory that is taken."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fused_siglip import siglip_loss
from fused_siglip.kernels import BACKENDS, Affine, Pairs, aligned, panel_class
from fused_siglip.planner import PlanRequest, plan_panels, waves
from fused_siglip.spec import Execution, GradMask
from fused_siglip.sweep import GradBuffers, sweep
from support.inputs import loss_and_grads, make_inputs
from support.memory import peak_allocated

SIZES = [(1, 1), (64, 64), (65, 1), (1000, 1000), (2100, 2100), (8192, 8192), (32768, 100)]
BUDGETS = [None, 1 << 20, 100 << 20]


def plan_of(*size, **options):
    return plan_panels(PlanRequest(*size, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("budget", BUDGETS)
def test_plan_keeps_the_budget_and_covers_with_even_panels(dtype, device_type, size, budget):
    m, n = size
    plan = plan_of(m, n, 768, dtype, device_type, "torch", workspace_bytes=budget)
    tile_m, tile_n = panel_class("torch").tile
    assert 1 <= plan.rows <= m and 1 <= plan.cols <= n
    assert plan.workspace_bytes <= (budget or 1 << 30)
    for side, total, tile in ((plan.rows, m, tile_m), (plan.cols, n, tile_n)):
        assert side == total or side % tile == 0
        panels = -(-total // side)
        # no sliver at the end: every panel but the last could not be smaller by a tile
        assert panels == 1 or (side - tile) * panels < total


def test_plan_shrinks_when_less_is_needed_and_predicts_only_what_it_holds():
    options = dict(m=4096, n=4096, d=512, dtype=torch.float32, device_type="cpu", backend="torch")
    full = plan_of(**options)
    frozen = plan_of(**options, grads=GradMask(image=False))
    assert full.peak_bytes - frozen.peak_bytes == 4096 * 512 * 4
    forward = plan_of(**options, grads=GradMask(False, False, False))
    assert forward.peak_bytes == forward.workspace_bytes


def test_peak_memory_does_not_grow_with_the_square_of_the_batch():
    """Workspace alone: the accumulators are the gradients themselves."""
    extra = {b: plan_of(b, b, 768, torch.float32, "cpu", "torch").workspace_bytes
             for b in (8192, 32768, 1 << 20)}  # fmt: skip
    assert max(extra.values()) == min(extra.values()) <= 64 << 20


GPUS = {"A100": 108, "RTX 4090": 128, "H100, H200": 132, "MI300X": 304}


@pytest.mark.parametrize("multiprocessors", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("d", [768, 1024, 1152])
@pytest.mark.parametrize("b", [512, 8192, 20000, 65536, 1 << 20])
def test_plan_fills_waves(multiprocessors, d, b):
    pytest.importorskip("triton")

    def plan(**options):
        return plan_of(b, b, d, torch.bfloat16, "cuda", "triton", **options)

    even, chosen = plan(), plan(multiprocessors=multiprocessors)
    assert chosen.workspace_bytes <= 384 << 20
    assert (chosen.rows == b) == (even.rows == b)  # one panel where one fits
    if chosen.rows < b:
        assert waves(b, chosen.rows, d, multiprocessors) <= waves(b, even.rows, d, multiprocessors)
        assert chosen.rows >= even.rows // 2


def test_documented_decisions_are_the_planners():
    pytest.importorskip("triton")
    text = (Path(__file__).resolve().parents[2] / "docs/planner.md").read_text()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()
            if line.startswith(tuple(f"| {name} |" for name in GPUS))]  # fmt: skip
    assert len(rows) == 40
    for name, multiprocessors, b, d, panel, dx_waves, full, workspace, peak in rows:
        assert GPUS[name] == int(multiprocessors)
        b, d = int(b), int(d)
        plan = plan_of(b, b, d, torch.bfloat16, "cuda", "triton", multiprocessors=GPUS[name])
        assert panel == f"{plan.rows} x {plan.cols}"
        count = waves(b, plan.rows, d, GPUS[name])
        assert int(dx_waves) == count
        assert full == f"{b / 128 * -(-d // 256) / GPUS[name] / count:.2f}"
        assert int(workspace) == round(plan.workspace_bytes / 2**20)
        assert int(peak) == round(plan.peak_bytes / 2**20)


@pytest.mark.parametrize("mode", ["full", "frozen", "no grad"])
def test_planned_peak_memory_is_what_torch_allocates(mode):
    """Of a strip's buffers only those are made that this loss needs; nothing else is left out."""
    m, d = 3000, 96
    needed = GradMask(mode == "full", mode != "no grad", mode != "no grad")
    plan = plan_of(m, m, d, torch.float32, "cpu", "torch", grads=needed)
    assert plan.rows < m
    requires_grad = (needed.image, needed.text, needed.scalars, needed.scalars)
    inputs = make_inputs(m, m, d, requires_grad=requires_grad)
    measured = peak_allocated(lambda: loss_and_grads(siglip_loss, inputs))
    strip = plan.workspace_bytes - plan.rows * plan.cols * torch.float32.itemsize
    scalars = 4096  # a few tensors of one element
    assert plan.peak_bytes - strip <= measured <= plan.peak_bytes + scalars


PRODUCTS = {
    "all": (GradMask(True, True, True), 3),
    "image tower frozen": (GradMask(False, True, True), 2),
    "text tower frozen": (GradMask(True, False, True), 2),
    "both frozen": (GradMask(False, False, True), 1),
    "no_grad": (GradMask(False, False, False), 1),
}


@pytest.mark.parametrize("needs,products", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("workspace", [1 << 16, 1 << 25])
def test_only_the_products_that_are_needed(needs, products, workspace):
    m, n, d = 300, 200, 48
    x, y, t, b = torch.randn(m, d), torch.randn(n, d), torch.tensor(10.0), torch.tensor(-10.0)
    with FlopCounterMode(display=False) as counter:
        out = GradBuffers(
            torch.empty(m, d) if needs.image else None,
            torch.empty(n, d) if needs.text else None,
            needs.scalars,
        )
        sums = sweep(x, y, Affine(t, b), Pairs(), out, Execution("torch", workspace))
    assert counter.get_total_flops() == products * 2 * m * n * d
    assert len(sums) == (3 if needs.scalars else 1) and torch.all(sums.sum(1) != 0)


@pytest.mark.parametrize("ids", [False, True], ids=["diagonal", "ids"])
@pytest.mark.parametrize(
    "layout", ["D = 65", "rows 72 apart", "transposed", "off by one element", "as it comes"]
)
def test_operands_are_padded_where_the_backend_asks(monkeypatch, layout, ids):
    """Copies of one panel at a time, zeros beyond D, the same loss and gradients."""
    seen = []

    class Picky(panel_class("torch")):
        align = 16

        def __call__(self, x, y, *rest):
            seen.append((x, y))
            assert aligned(x, 16) and aligned(y, 16)
            return super().__call__(x, y, *rest)

    monkeypatch.setitem(BACKENDS, "picky", lambda: Picky)
    d = 65 if layout == "D = 65" else 64
    inputs = make_inputs(300, 300, d, ids=ids)
    if layout == "rows 72 apart":
        wide = torch.nn.functional.pad(inputs.text_features.detach(), (0, 8))
        inputs.text_features = wide[:, :d].requires_grad_()
    if layout == "off by one element":
        flat = torch.nn.functional.pad(inputs.text_features.detach().view(-1), (1, 0))
        inputs.text_features = flat[1:].view(300, d).requires_grad_()
    if layout == "transposed":
        inputs.image_features = inputs.image_features.detach().T.contiguous().T.requires_grad_()
    expected, actual = (
        loss_and_grads(siglip_loss, inputs, backend=name, workspace_bytes=1 << 20)
        for name in ("torch", "picky")
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    x = seen[0][0]
    assert x.shape[1] == (80 if d == 65 else 64) and not x[:, d:].any()
    in_place = x.data_ptr() == inputs.image_features.data_ptr()
    assert in_place == (layout == "as it comes" and not ids)


def test_few_images_keep_the_budget_too():
    """A row of tiles as many as a square holds would take more than the square."""
    pytest.importorskip("triton")
    budget = 455_033
    plan = plan_of(
        61, 8089, 64, torch.bfloat16, "cpu", "triton", image_losses=True, workspace_bytes=budget
    )
    assert plan.workspace_bytes <= budget


def test_padded_operands_are_in_the_planned_peak():
    pytest.importorskip("triton")
    plans = {d: plan_of(4096, 4096, d, torch.bfloat16, "cuda", "triton") for d in (1000, 1008)}
    assert [plan.operand_dim for plan in plans.values()] == [1008, 1008]
    accumulators = {d: 2 * 4096 * d * 4 for d in plans}
    beyond = {d: plan.peak_bytes - accumulators[d] for d, plan in plans.items()}
    assert beyond[1000] - beyond[1008] == 2 * 4096 * 1008 * 2
    assert plan_of(4096, 4096, 1000, torch.bfloat16, "cuda", "torch").operand_dim == 1000
