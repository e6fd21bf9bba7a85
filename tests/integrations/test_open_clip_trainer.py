"""open_clip itself with the fused loss: its factories, and its command line trainer."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

pytest.importorskip("torchvision")
pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")

from benchmarks.common.memory import peak_extra_bytes
from benchmarks.common.workloads import Case
from examples.captions import training_captions
from fused_siglip import SigLipLoss, siglip_loss
from fused_siglip.integrations import open_clip as integration
from fused_siglip.testing.rounding import UNIT_ROUNDOFF
from support.inputs import make_inputs
from support.tolerances import error

HERE = Path(__file__).parent
THEIRS = open_clip.loss.SigLipLoss
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def patched():
    integration.patch()
    yield
    integration.unpatch()


def arguments(**others):
    """What create_loss and create_task read of the trainer's arguments."""
    values = {
        "model": "tiny",
        "siglip": True,
        "distill": False,
        "local_loss": False,
        "gather_with_grad": False,
        "loss_dist_impl": None,
        "rank": 0,
        "world_size": 1,
        "horovod": False,
        "coca_caption_loss_weight": 2.0,
        "coca_contrastive_loss_weight": 1.0,
    }
    return types.SimpleNamespace(**values | others)


def test_create_loss_makes_the_fused_loss(patched):
    integration.patch()  # twice is once
    for name in (None, "bidir", "shift", "reduce", "gather"):
        loss = open_clip.create_loss(arguments(loss_dist_impl=name, rank=1, world_size=4))
        assert type(loss) is SigLipLoss
        assert (loss.dist_impl, loss.rank, loss.world_size) == (name, 1, 4)
    with pytest.raises(ValueError, match="dist_impl is 'alltoall': expected None, 'ring' or"):
        open_clip.create_loss(arguments(loss_dist_impl="alltoall"))


def test_other_losses_stay_open_clips(patched):
    for other, name in (
        ({"siglip": False}, "ClipLoss"),
        ({"distill": True}, "DistillClipLoss"),
        ({"model": "coca_tiny"}, "CoCaLoss"),
    ):
        loss = open_clip.create_loss(arguments(**other))
        assert type(loss).__module__ == "open_clip.loss" and type(loss).__name__ == name


def test_unpatch_gives_open_clip_its_class_back():
    integration.patch()
    integration.unpatch()
    assert open_clip.loss.SigLipLoss is open_clip.factory.SigLipLoss is THEIRS
    integration.unpatch()  # without a patch: nothing
    assert type(open_clip.create_loss(arguments())) is THEIRS


@pytest.mark.skipif(not hasattr(open_clip, "create_task"), reason="open_clip 3 has no tasks")
def test_tasks_of_open_clip_4_make_the_fused_loss(patched):
    from open_clip.task import SigLIPTask

    tower = torch.nn.Linear(2, 2)
    task = open_clip.create_task(arguments(loss_dist_impl="gather"), tower)
    assert isinstance(task, SigLIPTask) and type(task.loss) is SigLipLoss
    assert task.loss.dist_impl == "gather"
    assert isinstance(task.loss, open_clip.loss.SigLipLoss)
    assert type(SigLIPTask(tower).loss) is SigLipLoss
    passed = SigLipLoss()
    assert SigLIPTask(tower, loss=passed).loss is passed


@pytest.mark.parametrize("batch", [64, 70])
@pytest.mark.parametrize("negative_only", [False, True])
def test_equals_open_clips_inner_loss_whatever_the_chunk(batch, negative_only):
    inputs = make_inputs(batch, batch, 32)
    theirs = THEIRS()._loss(*inputs.tensors(), negative_only=negative_only)
    (expected,) = torch.autograd.grad(theirs, inputs.image_features)
    ours = siglip_loss(*inputs.tensors(), negative_only=negative_only)
    (grad,) = torch.autograd.grad(ours, inputs.image_features)
    # both are within a few roundings, and that of a logit of 20, of the same number
    bound = 40 * UNIT_ROUNDOFF[torch.float32]
    assert error(ours.detach(), theirs.detach().double()) <= bound
    assert error(grad, expected.double()) <= bound
    if not negative_only:
        for chunk_size in (0, 1, 8, 32, 64):
            assert torch.equal(SigLipLoss(chunk_size=chunk_size)(*inputs.tensors()), ours)


def test_the_loss_takes_a_fifth_of_the_memory_or_less():
    theirs, ours = (
        peak_extra_bytes(Case(loss, batch_size=4096, dim=64))
        for loss in ("open_clip", "fused_torch")
    )
    assert 5 * ours <= theirs, f"{ours} and {theirs} bytes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model's config, and 192 digits with captions as the trainer reads them."""
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "models").mkdir()
    (folder / "models/tiny.json").write_text(json.dumps(MODEL))
    digits = load_digits()
    captions = training_captions()
    lines = ["filepath\ttitle"]
    for i in range(192):
        image = Image.fromarray((digits.images[i] * 15).astype(np.uint8)).convert("RGB")
        image.save(folder / f"{i}.png")
        caption = captions[digits.target[i]]
        lines.append(f"{folder}/{i}.png\t{caption[i % len(caption)]}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder


def train(folder: Path, out: Path, *options: str, ranks: int = 1) -> tuple[dict, dict]:
    """{run: losses} and {run: parameters} of three runs of the command line trainer."""
    out.mkdir()
    (out / "models").symlink_to(folder / "models")
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(HERE / "open_clip_runs.py"), str(out), "--model", "tiny", "--siglip"]
    command += ["--dataset-type", "csv", "--train-data", str(folder / "pairs.csv")]
    command += ["--batch-size", "32", "--epochs", "2", "--warmup", "2", "--lr", "1e-3"]
    # gradients that are 0 but for rounding, such as of key biases, must not become steps of &lr
    command += ["--eps", "1e-4"]
    command += ["--workers", "0", "--device", "cpu", "--dist-backend", "gloo", *options]
    path = os.pathsep.join(str(HERE / p) for p in ("../..", ".."))
    # an installed open_clip of another version may come first on the path given
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), path)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    seen = json.loads((out / "losses.json").read_text())
    assert {run: {module for module, _ in calls} for run, calls in seen.items()} == {
        "own": {"open_clip.loss"},
        "fused": {"fused_siglip.modules"},
        "exact": {"__main__"},
    }
    losses = {run: torch.tensor([loss for _, loss in calls]) for run, calls in seen.items()}
    parameters = {}
    for run in losses:
        checkpoint = torch.load(out / run / "checkpoints/epoch_2.pt", map_location="cpu")
        values = checkpoint["state_dict"].values()
        parameters[run] = torch.cat([p.double().flatten() for p in values])
    return losses, parameters


@pytest.mark.parametrize(
    "options,ranks,steps",
    [
        (("--precision", "fp32"), 1, 12),
        (("--precision", "amp_bf16", "--grad-clip-norm", "1.0"), 1, 12),
        (("--precision", "fp32", "--accum-freq", "2"), 1, 12),
        (("--precision", "fp32"), 2, 6),
        (("--precision", "fp32", "--loss-dist-impl", "gather", "--accum-freq", "3"), 2, 6),
    ],
    ids=["fp32", "amp_bf16", "accum_freq=2", "two ranks", "two ranks, gather, accum_freq=3"],
)
def test_command_line_trainer_takes_the_same_steps(folder, tmp_path, options, ranks, steps):
    """Losses and parameters are as near to the run with a float64 loss as open_clip's own are."""
    losses, parameters = train(folder, tmp_path / "out", *options, ranks=ranks)
    for run in losses:
        assert len(losses[run]) == steps
    for values in (losses, parameters):
        exact = values["exact"].double()
        own, fused = ((values[run].double() - exact).norm() for run in ("own", "fused"))

        rounded = exact.norm() * UNIT_ROUNDOFF[torch.float32]
        assert fused <= 2 * max(own, rounded), (own, fused, rounded)
    assert losses["exact"][-1] < losses["exact"][0]


def test_command_line_trainer_wants_siglip():
    with pytest.raises(SystemExit, match="--siglip is missing: without it open_clip trains"):
        integration.main(["--model", "tiny"])
    integration.unpatch()
