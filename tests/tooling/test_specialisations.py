"""The rehearsal of a device run: which kernels it would compile, found on a CPU."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch

from support.devices import HAS_GPU, INTERPRETED

pytest.importorskip("triton")
pytest.importorskip("tqdm")
if INTERPRETED or HAS_GPU:
    pytest.skip("a GPU is pretended, which the interpreter cannot", allow_module_level=True)

from benchmarks.gpu.candidate_checks import check
from benchmarks.gpu.parts.run import FULL, Point
from benchmarks.gpu.specialisations import REHEARSED, pretended_gpu, recorded, rehearse
from benchmarks.gpu.tune_parts import products, small, steps
from benchmarks.suites.compiled import count_source, panel_source, product_source, score_source
from fused_siglip import Hardest, PositiveTarget, Random, retrieval_ranks, siglip_loss
from fused_siglip.kernels.hopper import HOPPER, suits

# Two panels' worth of one dim: a small batch takes the portable kernel, a large one Hopper's.
SIZES = replace(FULL, latency=(1024, 8192), panels=(8192, 768), determinism=(5000, 768), runs=2)
KERNEL = "hopper_panel_kernel" if suits((9, 0), torch.bfloat16) else "panel_kernel"


def kernels(found):
    return [(made.part, made.kernel.__name__, made.row()["constants"].get("D")) for made in found]


def test_kernels_by_part():
    found, ended = rehearse(("latency", "determinism", "sanitizer"), SIZES)
    assert ended == [(name, "ok", None) for name in ("latency", "determinism", "sanitizer")]
    names = kernels(found)
    assert ("latency", "panel_kernel", "768") in names
    assert ("latency", KERNEL, "768") in names
    assert ("sanitizer", "panel_kernel", "80") in names  # D = 72, padded
    assert not [name for name in names if name[0] == "determinism" and name[1] == KERNEL]
    rows = [json.loads(json.dumps(made.row())) for made in found]
    fp32 = [row for row in rows if row["types"].get("x_ptr") == "*fp32"]
    assert {row["constants"]["INPUT_PRECISION"] for row in fp32} == {"ieee"}
    ids = [row for row in rows if "image_ids_ptr" in row["types"]]
    assert [row["part"] for row in ids] == ["sanitizer"]


def test_every_part_runs_on_a_gpu_that_is_pretended():
    """Down to the last row: what only a GPU asks for is called, too."""
    sizes = replace(SIZES, speed=[Point(8192, 768, modes=True)], accuracy=[(256, 64)], sampled=[])
    sizes = replace(sizes, alternative=[(8192, 768)], million=(16384, 768))
    _, ended = rehearse(REHEARSED, sizes)
    assert ended == [(name, "ok", None) for name in REHEARSED]


def test_tuning_runs_on_a_gpu_that_is_pretended(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("go"))  # on to the timing
    found = {}
    with pretended_gpu(), recorded(found, "tune"):
        checked = list(check("group_8", (768,), "cuda"))
        kinds = {row["kind"] for part in (products, steps, small) for row in part([], "cuda")}
    assert [row["kind"] for row in checked] == ["checked"] * 3 + ["ready"] + ["panel"] * 2
    assert {"product", "step", "small"} <= kinds
    groups = [made.row()["constants"].get("GROUP_M") for made in found.values()]
    assert KERNEL == "panel_kernel" or {"8", str(HOPPER.group_m)} <= set(groups)


def test_no_kernel_is_compiled_for_a_batch_size():
    one, _ = rehearse(("latency",), replace(SIZES, latency=(300, 9000)))
    several, _ = rehearse(("latency",), replace(SIZES, latency=(257, 300, 511, 1000, 8192, 9999)))
    assert len(one) == len(several)
    assert len({str(made.row()) for made in one}) == len(one)


def test_a_specialisation_compiles():
    found, _ = rehearse(("latency",), replace(SIZES, latency=(64,)))
    (finish,) = [made for made in found if made.kernel.__name__ == "finish_kernel"]
    finish.compile()
    assert finish.row()["compile_seconds"] > 0


def test_a_hopper_panel_is_compiled_as_shipped():
    if KERNEL == "panel_kernel":
        pytest.skip("this release of Triton compiles the portable kernel alone")
    found, _ = rehearse(("latency",), replace(SIZES, latency=(8192,)))
    (made,) = [made for made in found if made.kernel.__name__ == KERNEL]
    constants = made.row()["constants"]
    assert (constants["STAGES"], constants["GROUP_M"]) == (str(HOPPER.stages), str(HOPPER.group_m))


def test_nothing_is_left_behind():
    rehearse(("latency",), replace(SIZES, latency=(64,)))
    x, y = torch.randn(2, 4, 8)
    loss = siglip_loss(x, y, torch.tensor(1.0), torch.tensor(0.0))
    assert loss.device.type == "cpu" and loss.isfinite()


def launched(inputs=(True, True), function=siglip_loss, **options) -> None:
    """A call on 300 pairs, small enough for the portable kernels."""
    x, y = (torch.randn(300, 768, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    scalars = (torch.tensor(v, device="cuda") for v in (10.0, -10.0))
    for_features, for_scalars = inputs
    leaves = [v.requires_grad_(for_features) for v in (x, y)]
    leaves += [v.requires_grad_(for_scalars) for v in scalars]
    if options.pop("ids", False):
        ids = torch.zeros(300, dtype=torch.int64, device="cuda")
        options |= {"image_ids": ids, "text_ids": ids}
    if options.pop("weights", False):
        weights = torch.ones(300, device="cuda")
        options |= {"image_weights": weights, "text_weights": weights}
    if function is retrieval_ranks:
        leaves = leaves[:2]
    function(*leaves, **options)


HASH, LOGIT = Random(0.001), Hardest(0.01)
SOURCES = {
    "panel": (panel_source, {}, {}),
    "ids": (panel_source, {"ids": True}, {"ids": True}),
    "forward": (
        panel_source, {"store_dlogits": False, "scalar_grads": False}, {"inputs": (False, False)},
    ),
    "frozen scalars": (panel_source, {"scalar_grads": False}, {"inputs": (True, False)}),
    "by hash": (panel_source, {"selection": "hash"}, {"negatives": HASH}),
    "by logit": (panel_source, {"selection": "logit"}, {"negatives": LOGIT}),
    "by logit, ids": (
        panel_source, {"selection": "logit", "ids": True}, {"negatives": LOGIT, "ids": True},
    ),
    "weights": (panel_source, {"weights": ("rows",)}, {"weights": True}),
    "weights, shares, targets, ids": (
        panel_source, {"weights": ("rows", "shares", "aligned", "targets"), "ids": True},
        {"weights": True, "ids": True, "positives": PositiveTarget(0, 0.3, 0.3, aligned=1.0),
         "label_smoothing": 0.1},
    ),
    "image losses": (
        panel_source,
        {"weights": ("rows", "image losses"), "store_dlogits": False, "scalar_grads": False},
        {"weights": True, "reduction": "none"},
    ),
    **{f"count {step}": (count_source, {"step": step}, {"negatives": LOGIT}) for step in range(3)},
    **{
        f"{kernel}, {'ids' if ids else 'diagonal'}": (
            score_source, {"kernel": kernel, "ids": ids}, {"function": retrieval_ranks, "ids": ids},
        )
        for kernel in ("best", "not below") for ids in (False, True)
    },
    "dX": (product_source, {"transposed": False, "accumulate": False}, {"negatives": LOGIT}),
    "dY": (product_source, {"transposed": True, "accumulate": False}, {"negatives": LOGIT}),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_compiled_ahead_of_time_is_what_a_launch_compiles(name):
    """The tests of compiled code look at the code that a GPU would run."""
    make, options, call = SOURCES[name]
    source, config = make("sm_90", torch.bfloat16, "ieee", **options)
    found = {}
    with pretended_gpu(), recorded(found, name):
        launched(**call)
    asked = [
        (made.signature, made.constants, {k: v for k, v in made.attributes.items() if v})
        for made in found.values()
        if made.kernel is source.fn
    ]
    assert (source.signature, source.constants, source.attrs) in asked
    used = [made.options for made in found.values() if made.kernel is source.fn]
    for option, value in config.options().items():
        assert {getattr(options, option) for options in used} == {value}
