"""Streams and processes beside the loss, and Ctrl-C in the middle of it."""

import os
import signal
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fused_siglip import siglip_loss
from fused_siglip.kernels.torch_panel import TorchPanel
from support.devices import HAS_GPU
from support.inputs import loss_and_grads, make_inputs, one_tile


class Batches(Dataset):
    """Features, and the loss as a worker computes it."""

    def __len__(self):
        return 6

    def __getitem__(self, seed):
        inputs = make_inputs(150, 150, 16, seed=seed)
        values = [tensor.detach() for tensor in inputs.tensors()]
        return values, siglip_loss(*values)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python's, of any fork
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loaders_beside_the_loss_change_no_bits(start):
    def losses(**options):
        loader = DataLoader(Batches(), batch_size=None, **options)
        return [(siglip_loss(*values), there) for values, there in loader]

    expected = losses()
    actual = losses(
        num_workers=1 if start == "spawn" else 2, multiprocessing_context=start, timeout=60
    )
    assert len(actual) == 6
    for (here, there), (e, _) in zip(actual, expected, strict=True):
        assert torch.equal(here, e)
        torch.testing.assert_close(there, e)  # workers have one thread: other sums


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_two_streams_get_the_same_bits(backend):
    inputs = [make_inputs(3000, 3000, 64, device="cuda", seed=seed) for seed in range(2)]
    expected = [loss_and_grads(siglip_loss, i, backend=backend) for i in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    actual = []
    for _ in range(10):
        for stream, i in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                actual.append(loss_and_grads(siglip_loss, i, backend=backend))
    torch.cuda.synchronize()
    for k, values in enumerate(actual):
        assert all(torch.equal(v, e) for v, e in zip(values, expected[k % 2], strict=True))


@pytest.fixture
def ctrl_c():
    """Python's own handling of it, also where the tests run in the background (nohup, cron)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("grads", [False, True])
def test_ctrl_c_ends_a_large_loss_at_once_and_the_next_is_right(ctrl_c, monkeypatch, grads):
    """The signal arrives from another thread while a panel is computed; no other is begun."""
    inputs = make_inputs(1024, 1024, 32, requires_grad=(grads,) * 4)
    options = {"workspace_bytes": 16 * one_tile("torch", torch.float32)}
    expected = loss_and_grads(siglip_loss, inputs, **options)
    panels, started = [], threading.Event()
    compute = TorchPanel.__call__

    def counted(panel, *arguments):
        panels.append(len(panels))
        if len(panels) == 3:
            started.set()
            while not sent.is_set():  # in the middle of this panel
                compute(panel, *arguments)
        return compute(panel, *arguments)

    sent = threading.Event()

    def press():
        started.wait(60)
        os.kill(os.getpid(), signal.SIGINT)
        sent.set()

    monkeypatch.setattr(TorchPanel, "__call__", counted)
    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        siglip_loss(*inputs.tensors(), **options)
    thread.join()
    assert len(panels) == 3  # of 16 or more
    monkeypatch.undo()
    actual = loss_and_grads(siglip_loss, inputs, **options)
    for a, e in zip(actual, expected, strict=True):
        assert a is e or torch.equal(a, e)
