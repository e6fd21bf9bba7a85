"""One panel of one process: the same numbers on the short way, and only what is right there."""

import pytest
import torch

from fused_siglip import (
    Below,
    Hardest,
    PositiveTarget,
    PositiveWeight,
    Random,
    compute,
    siglip_loss,
)
from fused_siglip.kernels import multiplies_half_into_fp32
from support.inputs import loss_and_grads, make_inputs, one_tile

NEEDS = {
    "all": (True,) * 4,
    "image": (True, False, False, False),
    "text": (False, True, False, False),
    "scalars": (False, False, True, True),
    "text, scalars": (False, True, True, True),
    "none": (False,) * 4,
}


@pytest.fixture
def ways(monkeypatch):
    """What the short way gave to every call: outputs, or None where it was not taken."""
    taken, single_panel = [], compute.single_panel

    def watched(*arguments):
        outputs = single_panel(*arguments)
        taken.append(outputs)
        return outputs

    monkeypatch.setattr(compute, "single_panel", watched)
    return taken


@pytest.mark.covering(2)
@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"negative_only": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(1, 32), (48, 64), (300, 64), (700, 32)], ids=str)
def test_both_ways_agree(monkeypatch, ways, backend, device, size, dtype, options, needs):
    """But for a rounding: the general way rounds its sums before they are divided, too."""
    n, d = size
    inputs = make_inputs(n, n, d, dtype, requires_grad=needs, device=device)
    short = loss_and_grads(siglip_loss, inputs, backend=backend, **options)
    half = dtype != torch.float32
    converted = backend == "torch" and half and not multiplies_half_into_fp32(device)
    if converted:
        assert ways == [None]
    else:
        (outputs,) = ways  # with the dtypes and shapes that torch.compile was told
        assert {output.dtype for output in outputs} == {torch.float32}
        asked = [n * d if needed else 0 for needed in needs[:2]]
        assert [output.numel() for output in outputs] == [1, 3, *asked]
    monkeypatch.setattr(compute, "single_panel", lambda *_: None)
    general = loss_and_grads(siglip_loss, inputs, backend=backend, **options)
    for a, e in zip(short, general, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e, rtol=1e-6, atol=0)


MORE_TO_DO = {
    "a share of the negatives": {"negatives": Random(0.5, seed=1)},
    "the hardest negatives": {"negatives": Hardest(0.5)},
    "negatives by a margin": {"negatives": Below(0.1)},
    "weights": {"image_weights": torch.full((70,), 0.5)},
    "positives that count more": {"positives": PositiveWeight(2.0)},
    "other targets": {"positives": PositiveTarget(0.9)},
    "smoothed labels": {"label_smoothing": 0.1},
    "the images' losses": {"reduction": "none"},
}


@pytest.mark.parametrize("options", MORE_TO_DO.values(), ids=MORE_TO_DO)
def test_what_there_is_more_to_do_for_goes_the_general_way(ways, options):
    loss_and_grads(siglip_loss, make_inputs(70, 70, 32), **options)
    assert ways == [None]


@pytest.mark.parametrize("size", [(130, 60), (60, 130), (0, 60), (60, 0), (0, 0)], ids=str)
def test_so_do_several_panels_and_no_pairs(ways, size):
    inputs = make_inputs(*size, 32)
    tile = one_tile("torch", torch.float32)
    loss_and_grads(siglip_loss, inputs, negative_only=True, workspace_bytes=tile)
    assert ways == [None]


def test_so_do_ids(ways):
    loss_and_grads(siglip_loss, make_inputs(70, 70, 32, ids=True))
    assert ways == [None]


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("layout", ["D = 20", "x off by one element", "y off by one element"])
def test_so_does_what_triton_would_not_read_fast(ways, backend, device, layout):
    inputs = make_inputs(70, 70, 20 if layout == "D = 20" else 32, device=device)
    for name in ("image_features", "text_features"):
        if layout.startswith("xy"[name == "text_features"]):
            features = getattr(inputs, name).detach()
            flat = torch.nn.functional.pad(features.view(-1), (1, 0))
            setattr(inputs, name, flat[1:].view_as(features).requires_grad_())
    loss_and_grads(siglip_loss, inputs, backend=backend)
    assert ways == [None]


@pytest.mark.parametrize("workspace_bytes", [None, 1 << 20], ids=["one panel", "several"])
def test_a_sum_that_float32_cannot_hold_is_infinite(workspace_bytes):
    """Each strip's sum is finite."""
    x = torch.ones(700, 4)
    scale, bias = torch.tensor(2.5e32), torch.tensor(0.0)
    options = {"reduction": "sum", "workspace_bytes": workspace_bytes}
    assert siglip_loss(x, x, scale, bias, **options) == torch.inf
