"""The example of Lightning, in its Trainer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torchvision_on_cpu import define_schemas

define_schemas()  # torchmetrics imports torchvision
import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from examples.train_lightning import Contrastive, Pairs
from examples.trainers import SEED

import digits_runs as runs
from launch import launch, returned


class Recorded(Contrastive):
    def __init__(self, tokenizer, loss, plain):
        super().__init__(tokenizer, runs.LOSSES[loss])
        self.plain = plain
        self.losses = []

    def configure_model(self):
        super().configure_model()
        self.towers.load_state_dict(runs.first_weights(len(self.tokenizer)))

    def configure_optimizers(self):
        return runs.plain_optimizer(self.towers) if self.plain else super().configure_optimizers()

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.losses.append(loss.detach().clone())
        return loss


def train(
    size: int = 1,
    loss: str = "fused",
    precision: str = "32-true",
    *,
    plain: bool = False,
    accumulate: int = 1,
    steps: int = 5,
    save: Path | None = None,
    resume: Path | None = None,
) -> dict:
    """A run of this process, one of ``size``, through the example's pieces and a Trainer."""
    L.seed_everything(SEED, verbose=False)
    train_pairs, test_pairs, tokenizer = runs.few_pairs()
    model = Recorded(tokenizer, loss, plain)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=size,
        strategy=DDPStrategy(process_group_backend="gloo") if size > 1 else "auto",
        precision=precision,
        max_epochs=-1,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        callbacks=[ModelCheckpoint(save, "last", every_n_train_steps=1)] if save else [],
        enable_checkpointing=save is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    pairs = Pairs(train_pairs, test_pairs, runs.BATCH)
    trainer.fit(model, pairs, ckpt_path=resume)
    (result,) = trainer.validate(model, pairs, verbose=False)
    return {
        "losses": torch.stack(model.losses),
        "parameters": {name: p.detach() for name, p in model.towers.named_parameters()},
        "tested": torch.tensor([result["test_loss"], result["test_accuracy"]]),
    }

def all_on_two(rank, size, folder):
    os.environ["LOCAL_RANK"] = str(rank)
    return {"plain": train(size, plain=True), "acc": train(size, plain=True, accumulate=2), "bf16": train(size, precision="bf16-mixed", plain=True), "adam": train(size)}

def test_it(tmp_path):
    exact={}
    two = returned(launch(all_on_two, 2, str(tmp_path)))
    for name, k in (("plain", dict(plain=True)), ("adam", {}), ("acc", dict(plain=True, accumulate=2)), ("bf16", dict(plain=True, precision="bf16-mixed"))):
        exact = train(loss="eager", **(k| {"precision": "64-true"}))
        eager = train(loss="eager", **k)
        fused = train(**k)
        print(name, exact["losses"], eager["losses"].dtype, exact["losses"].dtype, fused["tested"], exact["tested"])
        runs.assert_as_exact_as_eager(fused, eager, exact)
        print("two")
        runs.assert_as_exact_as_eager(runs.one_of([t[name] for t in two]), eager, exact)
