"""The panels that benchmarks compare the shipped one with compute the same."""

from __future__ import annotations

import pytest
import torch

from support.devices import HAS_GPU, INTERPRETED

pytest.importorskip("triton")
pytest.importorskip("tqdm")

from benchmarks.gpu.ablation_panels import (
    VARIANTS,
    InPlaceLibraryPanel,
    LibraryPanel,
    variant_loss,
)
from fused_siglip import siglip_loss
from fused_siglip.kernels import GRAD_SCALE, PanelSpec
from support.inputs import loss_and_grads, make_inputs
from support.tolerances import error, oracle

DEVICE = "cpu" if INTERPRETED else "cuda"
runs_triton = pytest.mark.skipif(
    not (HAS_GPU or INTERPRETED), reason="the Triton kernels need a GPU or TRITON_INTERPRET=1"
)


@pytest.mark.interpreter
@runs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ids", [False, True], ids=["diagonal", "ids"])
@pytest.mark.parametrize("name", [pytest.param(n, id=f"triton-{n}") for n in VARIANTS])
@pytest.mark.parametrize("panels", ["one", "several"])
def test_variant_agrees_with_the_shipped_panel(name, panels, ids, dtype):
    inputs = make_inputs(300, 300, 48, dtype, ids=ids, device=DEVICE)
    workspace = 6 * 128 * 256 * 8 if panels == "several" else None  # of unequal sizes
    expected, actual = (
        loss_and_grads(loss, inputs, backend=backend, workspace_bytes=workspace)
        for loss, backend in ((siglip_loss, "triton"), (variant_loss, name))
    )
    exact = oracle(inputs)
    # rounded similarities cost accuracy of z, |z| <= 20, and all the rest agrees
    rounded = name == "library_in_place" and dtype != torch.float32
    slack = 10 * torch.finfo(dtype).eps if rounded else 1e-6
    for a, e, x in zip(actual, expected, exact, strict=True):
        assert error(a, x) <= 1.5 * error(e, x) + slack


@pytest.mark.interpreter
@runs_triton
@pytest.mark.parametrize("panel", [LibraryPanel, InPlaceLibraryPanel], ids=lambda p: p.__name__)
def test_triton_workspace_is_what_is_allocated(panel):
    for dtype in (torch.float32, torch.float16):
        for store_dlogits in (True, False):
            spec = PanelSpec(100, 300, dtype, store_dlogits, True)
            made = panel(spec, torch.device(DEVICE))
            tensors = {t.data_ptr(): t for t in vars(made).values() if torch.is_tensor(t)}
            allocated = sum(t.nbytes for t in tensors.values())
            assert allocated == panel.workspace_bytes(spec)
    assert GRAD_SCALE[torch.float16] > 1
