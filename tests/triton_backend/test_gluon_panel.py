"""The Gluon panel kernel's own source on the emulator: numbers, races, and deliberate breaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

from soak import gluon_soak
from support.gluon.arrays import Deadlock, Fault, Race, Tensor
from support.gluon.breaks import BREAKS
from support.gluon.language import ROOT, load
from support.gluon.panel import (
    CONFIGS,
    EPS,
    FORMS,
    KERNEL,
    NO_DIAGONAL,
    ODD_IMAGES,
    SHAPES,
    Case,
    run,
)


@pytest.fixture(scope="module")
def kernel():
    return load(KERNEL)


def launches(config: str) -> Iterator[tuple[Case, int]]:
    """Cases of a configuration and the seeds of their orders."""
    for seed, shape in enumerate(SHAPES):
        yield replace(Case(**shape), **CONFIGS[config]), seed


@pytest.mark.parametrize(
    "config",
    [
        name if name == "shipped" else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in CONFIGS
    ],
)
def test_against_float64(kernel, config):
    """Each form of the epilogue runs."""
    ran = set()
    for case, seed in launches(config):
        ran |= set(run(kernel, case, seed).forms)
    assert ran == set(FORMS)


@pytest.mark.exhaustive
def test_blocks_as_on_a_device(kernel):
    pytest.importorskip("triton")
    from fused_siglip.kernels.hopper import HOPPER

    shipped = {
        "group": HOPPER.group_m,
        "stages": HOPPER.stages,
        "width": HOPPER.width,
        "buffers": HOPPER.store_buffers,
    }
    case = Case(
        m=300,
        n=300,
        d=136,
        diagonal=40,
        block=(*HOPPER.tile, HOPPER.block_k),
        warps=HOPPER.num_warps,
        **shipped,
    )
    run(kernel, case, seed=0)
    run(kernel, replace(case, diagonal=NO_DIAGONAL, odd=ODD_IMAGES), seed=1)
    small = Case(1, 1, 1, **CONFIGS["shipped"])
    assert small.block[1] // small.width == HOPPER.tile[1] // HOPPER.width
    assert small == replace(small, **(shipped | {"width": small.width}))


def test_log1p_wide():
    """Triton's interpreter lacks its logarithm; what it has is in test_triton_panel.py."""
    e = np.concatenate([np.linspace(0, 2, 50000), np.logspace(-37, 34.8, 50000), [1, 5.5e34]])
    e = e.astype(np.float32)
    exact = np.log1p(e.astype(np.float64))
    deviation = np.abs(load(ROOT / "kernels/triton_math.py").log1p_wide(Tensor(e)).a - exact)
    assert (deviation <= np.where(e <= 1, 2.8, 4.0) * EPS * exact).all()


@pytest.mark.exhaustive
def test_random_schedules(capsys):
    """A slice of `make soak-gluon`."""
    assert gluon_soak.main(["--schedules", "100", "--first", "0"]) == 0
    assert capsys.readouterr().out.endswith("100 schedules, no miss\n")


@pytest.mark.exhaustive
def test_a_miss_is_named_by_its_seed(capsys):
    broken = next(broken for broken in BREAKS if broken.what == "consumers do not wait")
    assert gluon_soak.main(["--schedules", "60", "--first", "7"], broken.edit) == 1
    out = capsys.readouterr().out
    assert "Race: product" in out and out.endswith("python -m soak.gluon_soak --seed 7\n")
    assert gluon_soak.main(["--seed", "7"], broken.edit) == 1
    assert gluon_soak.main(["--seed", "7"]) == 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.what)
def test_breaks_are_caught(broken):
    """In launches that the kernel as it is passes: see test_against_float64."""
    module = load(KERNEL, broken.edit)
    configs = [broken.config, *(name for name in CONFIGS if name != broken.config)]
    for tried, (case, seed) in enumerate(chain.from_iterable(map(launches, configs))):
        try:
            run(module, case, seed)
        except (Race, Deadlock, Fault, AssertionError) as error:
            print(f"{tried + 1} launches: {type(error).__name__}: {error}")
            return
    pytest.fail(f"{broken.what}: not caught")


def test_a_break_that_fits_nothing_is_an_error():
    lost = BREAKS[0]._replace(what="lost", old="no such text")
    with pytest.raises(ValueError, match="lost: multiply holds 'no such text' 0 times"):
        load(KERNEL, lost.edit)
