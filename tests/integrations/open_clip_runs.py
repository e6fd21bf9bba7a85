"""Runs open_clip's command line trainer with three losses, for test_open_clip_trainer.py.

    [torchrun --nproc-per-node 2] open_clip_runs.py FOLDER ARGUMENTS OF THE TRAINER...

Once with open_clip's own class, once with the fused one and once with the same loss in float64,
from one seed and on the same data. Rank 0 writes FOLDER/losses.json, {run: [[class, loss], ...]},
and the trainer FOLDER/<run>/checkpoints.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torchvision_on_cpu import define_schemas

define_schemas()
import open_clip
import open_clip_train.main

import fused_siglip.integrations.open_clip as fused

own = open_clip.loss.SigLipLoss


class Exact(own):
    """open_clip's loss, computed in float64 from the same features."""

    def forward(self, image_features, text_features, logit_scale, logit_bias, output_dict=False):
        tensors = (image_features, text_features, logit_scale, logit_bias)
        with torch.autocast("cpu", enabled=False):
            loss = super().forward(*(t.double() for t in tensors))
        return {"contrastive_loss": loss} if output_dict else loss


class OnCpu(torch.nn.parallel.DistributedDataParallel):
    """DistributedDataParallel without the device_ids that open_clip 3 gives on a CPU too."""

    def __init__(self, module, device_ids=None, **options):
        super().__init__(module, **options)


def train_exact(arguments: list[str]) -> None:
    open_clip.factory.SigLipLoss = open_clip.loss.SigLipLoss = Exact
    open_clip_train.main.main(arguments)


RUNS = {"own": open_clip_train.main.main, "fused": fused.main, "exact": train_exact}


def main() -> None:
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    open_clip.add_model_config(folder / "models")
    seen: dict[str, list] = {}

    def record(module, _, output):
        if isinstance(module, (own, fused.SigLipLoss)):
            seen[run].append([type(module).__module__, float(output["contrastive_loss"])])

    torch.nn.parallel.DistributedDataParallel = OnCpu
    torch.nn.modules.module.register_module_forward_hook(record)
    for run, train in RUNS.items():
        seen[run] = []
        train([*arguments, "--logs", str(folder), "--name", run])
        fused.unpatch()
        if torch.distributed.is_initialized():  # the trainer would start the group anew
            torch.distributed.init_process_group = lambda **_: None
    if os.environ.get("RANK", "0") == "0":
        (folder / "losses.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
