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
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum"}, {"negative_only": True}, {"workspace_bytes": 8 << 20}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(1, 32), (48, 64), (300, 64)], ids=str)
def test_both_ways_agree(monkeypatch, ways, backend, device, size, dtype, options, needs):
    """To a rounding of the sums: strips are added up in float64 on the short way."""
    n, d = size
    inputs = make_inputs(n, n, d, dtype, requires_grad=needs, device=device)
    short = loss_and_grads(siglip_loss, inputs, backend=backend, **options)
    converted = backend == "torch" and device == "cpu" and dtype != torch.float32
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


def test_so_do_ids_several_panels_and_no_rows(ways):
    loss_and_grads(siglip_loss, make_inputs(70, 70, 32, ids=True))
    inputs = make_inputs(130, 130, 32)
    loss_and_grads(siglip_loss, inputs, workspace_bytes=one_tile("torch", torch.float32))
    loss_and_grads(siglip_loss, make_inputs(0, 0, 32))
    assert ways == [None] * 3
