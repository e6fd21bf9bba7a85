"""What ranks agree on before the first large exchange, and on which device they do."""

import pytest
import torch
import torch.distributed as dist

from fused_siglip import Easiest, Hardest, settled, siglip_loss
from fused_siglip.distributed import agreement, exchange
from fused_siglip.kernels import PanelSpec, panel_class
from support.devices import INTERPRETED
from support.global_batch import IMPLS, assert_global
from support.inputs import make_inputs
from support.processes import launch, returned


def counted_on_the_device(rank: int, world_size: int) -> None:
    """As on a GPU: the host does not read how many images are padding."""
    exchange._is_read_freely = lambda device: False
    for rows in ([7, 5, 6], [18, 0, 0]):
        for impl in IMPLS:
            inputs = make_inputs(18, 18, 8, ids=True)
            assert_global(inputs, rows, dist_impl=impl)
            assert_global(inputs, rows, dist_impl=impl, reduction="sum")
            assert_global(make_inputs(18, 18, 8), rows, dist_impl=impl)
    padding = {"image_ids": torch.full((4,), -1), "text_ids": torch.full((4,), -1)}
    x = make_inputs(4, 4, 8).tensors()[0].detach()
    assert siglip_loss(x, x, 10.0, -10.0, group="world", **padding).item() == 0.0


def test_images_are_counted_where_the_host_need_not_wait():
    returned(launch(counted_on_the_device, 3))


@pytest.mark.parametrize(
    ("config", "features", "expected"),
    [
        ("cpu:gloo,cuda:nccl", "cuda:1", "cpu"),
        ("cuda:nccl", "cuda:1", "cuda:1"),  # not the current device
        ("cuda:nccl", "cpu", "cuda"),
        ("cuda:nccl", None, "cuda"),
        ("cuda:nccl", "meta", "cuda"),
        ("xpu:xccl", "xpu:3", "xpu:3"),
        ("cpu:gloo,cuda:gloo", None, "cpu"),
    ],
)
def test_headers_travel_on_the_features_device(monkeypatch, config, features, expected):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    device = None if features is None else torch.device(features)
    assert agreement._header_device(None, device) == torch.device(expected)


def no_transport(rank: int, world_size: int) -> None:
    dist.get_backend_config = lambda group: "cuda:nccl,cpux:gloo"
    exchanged = []
    agreement._exchange = lambda *args: exchanged.append(args)
    x = make_inputs(4, 4, 8).tensors()[0]
    with pytest.raises(ValueError, match=r"image_features is on cpu and group has the backends"):
        siglip_loss(x, x, 10.0, group="world")
    assert len(exchanged) == 1, "the other ranks are told"


def test_features_where_the_group_has_no_transport():
    returned(launch(no_transport, 2))


def unequal(rank: int, world_size: int, name: str, level: str) -> None:
    dist.set_debug_level(getattr(dist.DebugLevel, level))
    x, y = (t.detach() for t in make_inputs(4, 4, 8).tensors()[:2])
    scalars = {"logit_scale": 10.0, "logit_bias": -10.0}
    assert siglip_loss(x, y, **scalars, group="world").isfinite()
    scalars[name] += rank == 2
    siglip_loss(x, y, *(torch.tensor([v]) for v in scalars.values()), group="world")


@pytest.mark.parametrize("name", ["logit_scale", "logit_bias"])
@pytest.mark.parametrize("level", ["INFO", "DETAIL"])
def test_unequal_scalars_are_an_error_when_debugging(name, level):
    values = {"logit_scale": "10.0 on rank 0 and 11.0", "logit_bias": "-10.0 on rank 0 and -9.0"}
    for kind, message in launch(unequal, 3, name, level):
        assert kind == "raised"
        assert f"ranks disagree on {name}: {values[name]} on rank 2" in message


def test_unequal_scalars_are_not_read_otherwise():
    returned(launch(unequal, 3, "logit_scale", "OFF"))


def another_backend(rank: int, world_size: int, negatives) -> None:
    if rank == 1:  # as where Triton is installed on one machine only
        settled.default_backend = lambda *args: "triton"
    x, y = (t.detach() for t in make_inputs(4, 4, 8).tensors()[:2])
    siglip_loss(x, y, 10.0, -10.0, negatives=negatives, group="world")


@pytest.mark.parametrize("negatives", [Hardest(0.5), Easiest(0.5)], ids=repr)
def test_thresholds_are_looked_for_by_one_backend(negatives):
    """Each backend counts in steps of its own, in which texts go round the ranks."""
    for kind, message in launch(another_backend, 2, negatives):
        assert kind == "raised"
        assert "ranks disagree on backend: torch on rank 0 and triton on rank 1" in message
        assert "expected the same on every rank" in message


def frozen_beside_training(rank: int, world_size: int, workspace_bytes: int) -> None:
    """Rank 0 needs no gradient: its panels are smaller, until it hears of rank 1's."""
    inputs = make_inputs(4, 4, 8, requires_grad=(rank == 1,) * 4)
    siglip_loss(
        *inputs.tensors(), group="world", backend="triton", workspace_bytes=workspace_bytes
    ).detach()


def test_a_workspace_too_small_for_another_ranks_gradient(backend):
    """Refused before any rank waits for texts, on every rank, also on the one it is enough for."""
    if backend == "torch" or not INTERPRETED:
        pytest.skip("only the Triton backend takes less memory without gradients")
    workspaces = {spec: panel_class("triton").workspace_bytes(PanelSpec(1, 1, torch.float32, *spec))
                  for spec in ((False, False), (True, True))}  # fmt: skip
    small, large = workspaces.values()
    assert small < large
    returned(launch(frozen_beside_training, 2, large))
    for kind, message in launch(unequal_workspaces, 2, small, large):
        assert kind == "raised"
        assert "workspace_bytes of rank 0 of the group cannot hold one tile" in message


def unequal_workspaces(rank: int, world_size: int, small: int, large: int) -> None:
    frozen_beside_training(rank, world_size, large if rank else small)
