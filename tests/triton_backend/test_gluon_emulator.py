"""The emulator of Gluon kernels on a small one: what it computes, and that it finds misuse."""

from __future__ import annotations

import importlib
import inspect

import numpy as np
import pytest

from support.gluon import arrays, language
from support.gluon.arrays import Buffer, Deadlock, Fault, Int, Pointer, Race, bfloat16, float32
from support.gluon.hopper import Descriptor
from support.gluon.schedule import RandomOrder, launch

pytestmark = pytest.mark.exhaustive

# A producer loads blocks of x and y, a consumer multiplies them.
SOURCE = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier, tma, warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait,
)


@gluon.jit
def consumer(out_ptr, x_buffers, y_buffers, full, empty, STEPS: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    acc = warpgroup_mma_init(gl.zeros((16, 32), gl.float32, layout))
    for k in range(STEPS):
        mbarrier.wait(full.index(k % 2), k // 2 & 1)
        acc = warpgroup_mma(
            x_buffers.index(k % 2), y_buffers.index(k % 2).permute((1, 0)), acc,
            is_async=True, use_acc=k > 0,
        )
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(k % 2), count=1)
    rows = gl.program_id(0) * 16 + gl.arange(0, 16, gl.SliceLayout(1, layout))
    cols = gl.arange(0, 32, gl.SliceLayout(0, layout))
    gl.store(out_ptr + rows.to(gl.int64)[:, None] * 32 + cols[None, :], acc)


@gluon.jit
def producer(x_desc, y_desc, x_buffers, y_buffers, full, empty, STEPS: gl.constexpr):
    for k in range(STEPS):
        mbarrier.wait(empty.index(k % 2), k // 2 & 1 ^ 1)
        bar = full.index(k % 2)
        mbarrier.expect(bar, x_desc.block_type.nbytes + y_desc.block_type.nbytes)
        row0 = gl.program_id(0) * 16
        tma.async_copy_global_to_shared(x_desc, [row0, k * 16], bar, x_buffers.index(k % 2))
        tma.async_copy_global_to_shared(y_desc, [0, k * 16], bar, y_buffers.index(k % 2))


@gluon.jit
def kernel(x_desc, y_desc, out_ptr, STEPS: gl.constexpr):
    x_buffers = gl.allocate_shared_memory(x_desc.dtype, [2, 16, 16], x_desc.layout)
    y_buffers = gl.allocate_shared_memory(y_desc.dtype, [2, 32, 16], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(2):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    gl.warp_specialize([
        (consumer, (out_ptr, x_buffers, y_buffers, full, empty, STEPS)),
        (producer, (x_desc, y_desc, x_buffers, y_buffers, full, empty, STEPS)),
    ], [1], [24])
"""


def run(folder, seed: int, old: str = "", new: str = "", steps: int = 5) -> None:
    """The product of (40, 16 * steps) and (32, 16 * steps) features, one place of it changed."""
    assert not old or SOURCE.count(old) == 1
    path = folder / "kernel.py"
    path.write_text(SOURCE.replace(old, new) if old else SOURCE)
    draw = np.random.default_rng(seed)
    x, y = (
        Descriptor(
            Buffer((rows, 16 * steps - 3), bfloat16, draw.standard_normal((rows, 16 * steps - 3))),
            (block, 16),
        )
        for rows, block in ((40, 16), (32, 32))
    )
    out = Buffer((48, 32), float32)
    arguments = {"x_desc": x, "y_desc": y, "out_ptr": Pointer(out), "STEPS": steps}
    launch(language.load(path).kernel, 3, arguments, RandomOrder(seed))
    assert (out.writes == 1).all() and not out.data[40:].any()
    np.testing.assert_allclose(out.data[:40], x.array @ y.array.T, atol=1e-4)


def test_a_product_in_many_orders(tmp_path):
    for seed in range(20):
        run(tmp_path, seed)


WAIT_FOR_FULL = "        mbarrier.wait(full.index(k % 2), k // 2 & 1)\n"
WAIT_FOR_EMPTY = "        mbarrier.wait(empty.index(k % 2), k // 2 & 1 ^ 1)\n"
INIT_EMPTY = "        mbarrier.init(empty.index(s), count=1)\n"
X_BYTES, Y_BYTES = "x_desc.block_type.nbytes", " + y_desc.block_type.nbytes"
ROWS = "rows.to(gl.int64)[:, None] * 32"


@pytest.mark.parametrize(
    "old, new, error, says",
    [
        (WAIT_FOR_FULL, "", Race, "had not landed|nothing tells that the copy"),
        (WAIT_FOR_EMPTY, "", (Race, Fault), "nothing tells that the|more arrivals"),
        ("k // 2 & 1 ^ 1", "k // 2 & 1", Deadlock, "partitions 0, 1 wait forever"),
        ("warpgroup_mma_wait(0,", "warpgroup_mma_wait(1,", Race, "product"),
        (X_BYTES + Y_BYTES, X_BYTES, (Race, Deadlock), "had not landed|nothing tells|wait forever"),
        (X_BYTES + Y_BYTES, X_BYTES + Y_BYTES * 2, Deadlock, "wait forever"),
        ("full.index(s), count=1", "full.index(s), count=2", Deadlock, "wait forever"),
        (INIT_EMPTY, "", Fault, "before it was initialised"),
        (INIT_EMPTY, INIT_EMPTY * 2, Fault, "initialised twice"),
        ("mbarrier.arrive(empty", "mbarrier.arrive(full", (Fault, Deadlock), "more|forever"),
        ("gl.arange(0, 16,", "gl.arange(0, 15,", Fault, "power of two"),
        (ROWS, "rows[:, None] * 2**28", Fault, "int32 overflows"),
        (ROWS, ROWS + " + 1", Fault, "outside"),
        (ROWS, "rows[:, None] * 16", Fault, "written twice"),
        ("[2, 32, 16]", "[1, 32, 16]", Fault, "view out of bounds"),
        ("[2, 32, 16]", "[2, 64, 16]", Fault, "copy of"),
        ("[2, 32, 16]", "[7000, 32, 16]", Fault, "bytes of shared memory"),
        ("], [1], [24])", "], [1], [24, 24])", Fault, "warps and registers"),
        ("gl.program_id(0) * 16 +", "(gl.program_id(0) - 9) // 2 +", Fault, "negative"),
        ("gl.zeros(", "gl.ones(", AttributeError, r"the emulator has no triton\..*ones"),
    ],
)
def test_misuse_is_found(tmp_path, old, new, error, says):
    for seed in range(3):
        with pytest.raises(error, match=says):
            run(tmp_path, seed, old, new)


def test_int_is_an_int32_of_c():
    i = Int(7)
    assert (i // 2, i % 4, 1 - i, -i) == (3, 3, -6, -7)
    assert all(isinstance(v, Int) for v in (i // 2, 20 // i, 1 - i, i * i))
    assert ~(i < 7) and not ~(i <= 7)  # logical
    for wrong in (lambda: -i // 2, lambda: -i % 2, lambda: i * 2**30, lambda: 2**31 - 1 + i):
        with pytest.raises(Fault):
            wrong()


def test_halves_are_rounded_to_even():
    numbers = np.float32([1 + 2**-8, 1 + 3 * 2**-8, -3.14159, 1e-41, np.inf, -0.0, 65520])
    torch = pytest.importorskip("torch")
    for dtype in ("bfloat16", "float16"):
        expected = torch.tensor(numbers).to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(arrays.rounded(numbers, getattr(arrays, dtype)), expected)
    assert np.isnan(arrays.rounded(np.float32([np.nan]), bfloat16)).all()


def test_maxima_ignore_nan_unless_told():
    tl = language.stubs()["triton.language"]
    numbers = np.float32([[1, np.nan, 5, -np.inf], [np.nan] * 4])
    x = arrays.Tensor(numbers)
    larger = lambda a, b: tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)  # noqa: E731
    for most in (tl.max(x, 1), tl.reduce(x, 1, tl.maximum), tl.reduce(x, 1, tl.maximum, True)):
        np.testing.assert_array_equal(most.a.flatten(), np.float32([5, np.nan]))
    np.testing.assert_array_equal(tl.reduce(x, 1, larger).a, np.float32([np.nan, np.nan]))
    np.testing.assert_array_equal(tl.reduce(x, 0, larger, True).a, numbers[1:] * numbers[:1])
    assert tl.reduce(x, 1, tl.maximum, keep_dims=True).shape == (2, 1)
    np.testing.assert_array_equal(tl.minimum(x, 2.0).a, np.fmin(numbers, 2))
    with pytest.raises(Fault, match="power of two"):
        tl.reduce(arrays.Tensor(np.zeros(6, np.float32)), 0, tl.maximum)


@pytest.mark.parametrize(
    "name", [language.GLUON + ".language", language.HOPPER], ids=["language", "hopper"]
)
def test_names_and_arguments_are_gluons(name):
    """Those that the emulator offers; Gluon may take more arguments."""
    pytest.importorskip("triton")
    if not hasattr(importlib.import_module(language.GLUON), "language"):
        pytest.skip("this triton has no such Gluon")
    ours, theirs = language.stubs()[name], importlib.import_module(name)
    pairs = [(theirs, *item) for item in vars(ours).items() if item[0][0] != "_"]
    for part in {"mbarrier", "tma"} & set(vars(ours)):
        pairs += [(getattr(theirs, part), *item) for item in vars(getattr(ours, part)).items()]
    for module, leaf, our in pairs:
        if leaf == "range" or not inspect.isfunction(our):  # Python's; numbers and types
            continue
        their = getattr(module, leaf)
        real = inspect.signature(getattr(their, "fn", their)).parameters
        keywords = [
            p.name for p in inspect.signature(our).parameters.values() if p.default != p.empty
        ]
        assert set(keywords) <= set(real), leaf
