"""The cost model: held against what real processes exchange and allocate, and its shape."""

import functools
import subprocess
import sys
from itertools import pairwise, product

import pytest
import torch
import torch.distributed as dist

from fused_siglip import siglip_loss
from fused_siglip.estimate import cost
from fused_siglip.estimate.__main__ import main
from fused_siglip.estimate.cost import DEVICES, bytes_sent, peak_bytes, predict, step_flops
from fused_siglip.kernels import PanelSpec
from fused_siglip.kernels.torch_panel import TorchPanel
from support.inputs import loss_and_grads, make_inputs
from support.memory import peak_allocated
from support.processes import launch, launch_each, returned

pytest.importorskip("tqdm")  # the benchmarks' own need

from benchmarks.common.traffic import counted

IMPLS = ("ring", "gather")
H200 = DEVICES["h200"]


# --- against real processes ---


def exchanged(rank: int, world_size: int, impl: str, rows: int, dim: int, dtype) -> int:
    inputs = make_inputs(rows, rows, dim, dtype)
    with counted() as traffic:
        siglip_loss(*inputs.tensors(), group=dist.group.WORLD, dist_impl=impl).backward()
    assert traffic.seconds > 0
    return traffic.bytes_sent


SIZES = (64, 48)
EXCHANGES = [(impl, *SIZES, dtype) for impl in IMPLS for dtype in (torch.float32, torch.bfloat16)]


@functools.cache
def exchanges(world_size: int) -> dict[tuple, list[tuple]]:
    return launch_each(exchanged, world_size, EXCHANGES)


@pytest.mark.parametrize("impl,rows,dim,dtype", EXCHANGES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_are_those_that_ranks_send(impl, rows, dim, dtype, world_size):
    sizes = rows, dim
    counts = returned(exchanges(world_size)[(impl, *sizes, dtype)])
    expected = bytes_sent(impl, world_size, *sizes, dtype)
    assert counts == pytest.approx([expected] * world_size, rel=0.05)
    assert min(counts) > expected  # the exchange of sizes comes on top


def allocated(rank: int, world_size: int, impl: str, rows: int, dim: int) -> int:
    inputs = make_inputs(rows, rows, dim)
    options = {"group": dist.group.WORLD, "dist_impl": impl}
    return peak_allocated(lambda: loss_and_grads(siglip_loss, inputs, **options))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("impl", IMPLS)
def test_memory_is_what_ranks_allocate(impl, world_size):
    """Of a strip's buffers only those are made that this loss needs."""
    rows, dim = 512, 256
    peaks = returned(launch(allocated, world_size, impl, rows, dim))
    expected = peak_bytes(impl, world_size, rows, dim, torch.float32, "cpu", "torch")
    cols = rows if impl == "ring" else world_size * rows
    panel = PanelSpec(rows, cols, torch.float32, True, True)
    strip = TorchPanel.workspace_bytes(panel) - rows * cols * torch.float32.itemsize
    scalars = 16384  # tensors of a few elements, and what ranks tell each other of a call
    for peak in peaks:
        assert expected - strip <= peak <= expected + scalars, (peaks, expected, strip)


# --- shape ---


def memory(impl: str, world_size: int, rows: int, dim: int = 1152) -> int:
    return peak_bytes(impl, world_size, rows, dim, torch.bfloat16, "cuda", "torch")


def test_memory_of_the_ring_depends_on_the_local_batch_alone():
    for rows in (1, 512, 4096):
        assert len({memory("ring", world_size, rows) for world_size in (2, 3, 8, 1024)}) == 1
    sizes = [memory("ring", 8, rows) for rows in (128, 256, 512, 1024, 4096)]
    assert all(a < b for a, b in pairwise(sizes))


def test_memory_of_gather_grows_with_the_world():
    sizes = [memory("gather", world_size, 512) for world_size in (2, 4, 8, 64, 1024)]
    assert all(a < b for a, b in pairwise(sizes))
    # at 1024 ranks nearly all of it is everybody's texts in bf16 and their gradients in fp32
    assert sizes[-1] == pytest.approx(1024 * 512 * 1152 * (2 + 4), rel=0.1)


def test_one_rank_exchanges_nothing():
    for impl in IMPLS:
        alone = predict(impl, 1, 4096, 768, torch.bfloat16, H200)
        assert alone.bytes_sent == alone.communication_seconds == alone.hidden_seconds == 0
        assert alone.seconds == alone.compute_seconds


@pytest.mark.parametrize(
    ("impl", "name", "world_size", "rows", "dtype"),
    [*product(IMPLS, DEVICES, (2, 8, 9, 1024), (16, 512, 16384), (torch.bfloat16, torch.float32))],
)
def test_times_fit_each_other(impl, name, world_size, rows, dtype):
    device = DEVICES[name]
    c = predict(impl, world_size, rows, 768, dtype, device)
    link = device.node if world_size <= cost.RANKS_PER_NODE else device.network
    assert c.flops == step_flops(world_size, rows, 768)
    assert c.compute_seconds >= c.flops / device.flops[dtype] * (1 - 1e-9)
    assert c.communication_seconds > c.bytes_sent / link.bandwidth
    assert 0 <= c.hidden_seconds < min(c.compute_seconds, c.communication_seconds) + 1e-12
    assert (c.hidden_seconds > 0) == (impl == "ring")
    longest = max(c.compute_seconds, c.communication_seconds)
    assert longest * (1 - 1e-9) <= c.seconds <= c.compute_seconds + c.communication_seconds


def test_ring_hides_its_exchanges_under_large_products():
    # all but the last exchange, which has no sweep beside it
    c = predict("ring", 8, 32768, 1152, torch.bfloat16, H200)
    last = 32768 * 1152 * 4 / H200.node.bandwidth + cost.OPERATION + H200.node.latency
    assert c.communication_seconds - c.hidden_seconds == pytest.approx(last)


# --- the command ---

EXAMPLE = ["--world-size", "1024", "--local-batch", "512", "--dim", "1152", "--device", "h200"]


def test_command_prints_both_modes_and_its_assumptions():
    # a warning of runpy's would be an error of this
    command = [sys.executable, "-W", "error", "-m", "fused_siglip.estimate", *EXAMPLE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("1024 x h200, 512 rows each (global batch 524288), D = 1152, bf16")
    assert lines[2].split() == list(IMPLS)
    rows = ("peak memory", "bytes sent", "FLOPs", "compute", "communication", "  hidden by compute")
    assert [any(line.startswith(row) for line in lines) for row in rows] == [True] * len(rows)
    assert "dist_impl=None chooses ring." in lines
    assert "Assumed, not measured here" in done.stdout
    assert max(map(len, lines)) <= 100


def test_command_prints_one_mode(capsys):
    main([*EXAMPLE, "--dist-impl", "gather", "--dtype", "fp32"])
    assert capsys.readouterr().out.splitlines()[2].split() == ["gather"]


@pytest.mark.parametrize("option", ["--world-size", "--local-batch", "--dim"])
def test_command_names_what_is_wrong(option, capsys):
    arguments = EXAMPLE.copy()
    arguments[arguments.index(option) + 1] = "0"
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"argument {option}: 0: expected at least 1" in capsys.readouterr().err
