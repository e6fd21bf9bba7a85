"""The Gluon panel kernel's own source on the emulator: numbers, races, and deliberate breaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import gluon_soak
import pytest

from support.gluon.arrays import Deadlock, Fault, Race
from support.gluon.breaks import BREAKS
from support.gluon.language import load
from support.gluon.panel import CONFIGS, FORMS, KERNEL, SHAPES, Case, run


@pytest.fixture(scope="module")
def kernel():
    return load(KERNEL)


def launches(config: str) -> Iterator[tuple[Case, int]]:
    """Cases of a configuration and the seeds of their orders."""
    for seed, shape in enumerate(SHAPES):
        yield replace(Case(**shape), **CONFIGS[config]), seed


@pytest.mark.parametrize("config", CONFIGS)
def test_against_float64(kernel, config):
    """Each form of the epilogue runs."""
    ran = set()
    for case, seed in launches(config):
        ran |= set(run(kernel, case, seed).forms)
    assert ran == set(FORMS)


@pytest.mark.parametrize("shared", [False, True])
def test_blocks_as_on_a_device(kernel, shared):
    pytest.importorskip("triton")
    from fused_siglip.kernels.hopper import HOPPER

    config = replace(HOPPER, shared=True, tile=(256, 128), stages=4) if shared else HOPPER
    case = Case(
        m=300,
        n=300,
        d=136,
        diagonal=40,
        group=config.group_m,
        stages=config.stages,
        width=config.width,
        consumers=config.consumers,
        block=(*config.tile, config.block_k),
        shared=config.shared,
        buffers=config.store_buffers,
        warps=config.num_warps,
    )
    run(kernel, case, seed=0)


def test_random_schedules(capsys):
    """A slice of `make soak-gluon`."""
    assert gluon_soak.main(["--schedules", "60", "--first", "0"]) == 0
    assert capsys.readouterr().out.endswith("60 schedules, no miss\n")


def test_a_miss_is_named_by_its_seed(capsys):
    broken = next(broken for broken in BREAKS if broken.what == "consumers do not wait")
    assert gluon_soak.main(["--schedules", "60", "--first", "7"], broken.edit) == 1
    out = capsys.readouterr().out
    assert "Race: product" in out and out.endswith("python -m gluon_soak --seed 7\n")
    assert gluon_soak.main(["--seed", "7"], broken.edit) == 1
    assert gluon_soak.main(["--seed", "7"]) == 0


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
