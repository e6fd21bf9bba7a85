"""The last step of a sweep: sums in parts become the loss and the factors of its gradients."""

import pytest
import torch

from fused_siglip.kernels import panel_class


@pytest.mark.covering(2)
@pytest.mark.parametrize("divisor", [1, 3.5, torch.tensor(7)], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("count", [1, 5, 1024, 2500])
def test_sums_in_parts(backend, device, count, rows, divisor):
    partials = torch.rand(rows, count, generator=torch.Generator().manual_seed(0)).to(device)
    if isinstance(divisor, torch.Tensor):
        divisor = divisor.to(device)
    scale = torch.tensor(10.0, device=device)
    finish = panel_class(backend).finish
    loss, factors = finish(partials, scale, divisor)
    exact = torch.cat([partials.double().sum(1), torch.zeros(3 - rows).to(partials), scale[None]])
    found = torch.cat([loss[None], factors]).double()
    torch.testing.assert_close(found, exact / divisor, rtol=1e-6, atol=0)
    # panels leave their sums side by side: the other way round in memory
    again = torch.cat([v.view(-1) for v in finish(partials.T.contiguous().T, scale, divisor)])
    torch.testing.assert_close(again.double(), exact / divisor, rtol=1e-6, atol=0)


def test_a_sum_that_is_not_finite_stays_so(backend, device):
    partials = torch.tensor([[torch.inf, 1.0], [torch.nan, 0.0], [2.0, 3.0]], device=device)
    loss, factors = panel_class(backend).finish(partials, torch.tensor(2.0, device=device), 2)
    assert loss == torch.inf and factors[0].isnan() and factors[1:].tolist() == [2.5, 1.0]
