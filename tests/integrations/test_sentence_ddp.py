"""Two processes train as one in sentence-transformers' trainer."""

import os

import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_models import (
    images,
    sentences,
    tiny_model,
    tiny_towers,
    trainer,
)
from sentence_runs import KINDS, ROUNDING, both, scale_and_bias, weights
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CoSENTLoss
from torch import nn

from fused_siglip.integrations.sentence_transformers import (
    SigLipLoss,
)
from support.processes import launch, returned
from support.tolerances import error

torch.set_num_threads(1)


def _ddp(rank, world_size, folder, cases):
    """[(encoder, [t', b], steps)] of the cases, each a run in DDP."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # of a group that exists
    os.environ["OMP_NUM_THREADS"] = "1"  # accelerate would set more
    return [_ddp_run(folder, *case) for case in cases]


def _ddp_run(folder, kind, gather, data, options):
    model = SentenceTransformer(
        str(folder / ("towers" if data == "images" else "model")), device="cpu"
    )
    loss = KINDS[kind](model, gather_across_devices=gather).double()
    dataset, losses = None, loss
    if data == "images":
        columns = {"image": images(64), "text": sentences(64)["anchor"]}
        dataset = Dataset.from_dict(columns)
    elif data == "mixed":  # a batch of the one on rank 0, of the other on rank 1
        scored = {"a": ["w1", "w2"] * 48, "b": ["w3", "w2"] * 48, "score": [0.1, 0.9] * 48}
        dataset = DatasetDict(
            first=Dataset.from_dict(sentences(96)), second=Dataset.from_dict(scored)
        )
        losses = {"first": loss, "second": CoSENTLoss(model)}
    elif data == "columns":  # pairs on rank 0, with hard negatives on rank 1
        dataset = DatasetDict(
            first=Dataset.from_dict(sentences(96)), second=Dataset.from_dict(sentences(96, 4))
        )
    run = trainer(folder / "run", model, losses, dataset=dataset, steps=4, **options)
    run.train()
    assert isinstance(run.model_wrapped, nn.parallel.DistributedDataParallel)
    return weights(model), scale_and_bias(loss), run.state.global_step


HALF = {"per_device_train_batch_size": 8}


DDP_CASES = {
    **{
        f"{kind}, accumulated {n}": (
            kind,
            True,
            "texts",
            {**HALF, "gradient_accumulation_steps": n},
        )
        for kind in KINDS
        for n in (1, 2)
    },
    **{f"{kind}, local": (kind, False, "texts", {}) for kind in KINDS},
    **{f"{kind}, images": (kind, True, "images", {}) for kind in KINDS},
    "mixed": ("plain", False, "mixed", {"multi_dataset_batch_sampler": "round_robin"}),
    **{
        f"{kind}, columns": (kind, True, "columns", {"multi_dataset_batch_sampler": "round_robin"})
        for kind in KINDS
    },
}


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """{case: its results on both ranks}, of two processes that run them one after the other."""
    folder = tmp_path_factory.mktemp("ddp")
    tiny_model().save_pretrained(str(folder / "model"))
    tiny_towers().save_pretrained(str(folder / "towers"))
    ranks = returned(launch(_ddp, 2, folder, list(DDP_CASES.values()), limit=500))
    return dict(zip(DDP_CASES, zip(*ranks, strict=True), strict=True))


@pytest.mark.parametrize("case", list(DDP_CASES))
def test_processes_stay_together(ddp, case):
    (encoder, own, steps), (other_encoder, other_own, other_steps) = ddp[case]
    assert steps == other_steps == 4
    assert torch.equal(encoder, other_encoder) and torch.equal(own, other_own)
    assert (own - torch.tensor([2.3026, -10])).abs().min() > 1e-5, "both have moved"


@both
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_equal_one(tmp_path, ddp, kind, accumulate):
    ours = ddp[f"{kind}, accumulated {accumulate}"][0]
    model = tiny_model()
    loss = SigLipLoss(model).double()
    run = trainer(tmp_path, model, loss, steps=4, gradient_accumulation_steps=accumulate)
    run.train()
    assert error(ours[0], weights(model)) < 10 * ROUNDING
    assert error(ours[1], scale_and_bias(loss)) < 10 * ROUNDING
