"""The example of Lightning, in its Trainer: against the eager loss, on two ranks, resumed."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from torchvision_on_cpu import define_schemas

from support.processes import launch, returned

define_schemas()  # also in the processes of launch(): Lightning imports torchvision
import digits_runs as runs
import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from examples.train_lightning import Contrastive, Pairs, main
from examples.trainers import SEED

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

CASES = {
    "sgd": {"sgd": True},
    "adamw": {},
    "accumulation": {"sgd": True, "accumulate": 2},
    "bf16": {"sgd": True, "precision": "bf16-mixed"},
    "ragged": {"sgd": True, "ragged": True},
}


class Recorded(Contrastive):
    """The example's module, from given weights; keeps the losses."""

    def __init__(self, tokenizer, loss: str, sgd: bool):
        super().__init__(tokenizer, runs.LOSSES[loss])
        self.first, self.sgd = runs.first_weights(len(tokenizer)), sgd
        self.losses = []

    def configure_model(self):
        if self.towers is None:
            super().configure_model()
            self.towers.load_state_dict(self.first)

    def configure_optimizers(self):
        return runs.sgd(self.towers) if self.sgd else super().configure_optimizers()

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.losses.append(loss.detach().clone())
        return loss


class Ragged(Pairs):
    """Every pair, in its place: of the last five one rank gets three and the other two."""

    def train_dataloader(self):
        rows, size = range(len(self.train)), self.trainer.world_size
        batches = [rows[i : i + self.batch_size] for i in rows[:: self.batch_size]]
        mine = [list(batch[self.trainer.global_rank :: size]) for batch in batches]
        return DataLoader(self.train, batch_size=None, sampler=mine)


def train(
    size: int = 1,
    loss: str = "fused",
    precision: str = "32-true",
    *,
    sgd: bool = False,
    accumulate: int = 1,
    ragged: bool = False,
    steps: int = 5,
    save: str | None = None,
    resume: str | None = None,
) -> dict:
    """What one of ``size`` ranks gets from the example's pieces in a Trainer."""
    L.seed_everything(SEED, verbose=False)
    train_pairs, test_pairs, tokenizer = runs.few_pairs()
    every_step = {"every_n_train_steps": 1, "enable_version_counter": False}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=size,
        strategy=DDPStrategy(process_group_backend="gloo") if size > 1 else "auto",
        precision=precision,
        max_epochs=-1,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        callbacks=[ModelCheckpoint(save, "last", **every_step)] if save else [],
        enable_checkpointing=bool(save),
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    model = Recorded(tokenizer, loss, sgd)
    pairs = (Ragged if ragged else Pairs)(train_pairs, test_pairs, runs.BATCH)
    trainer.fit(model, pairs, ckpt_path=resume)
    assert trainer.global_step == steps
    (result,) = trainer.validate(model, pairs, verbose=False)
    return {
        "losses": torch.stack(model.losses),
        "parameters": {name: p.detach() for name, p in model.towers.named_parameters()},
        "tested": torch.tensor([result["test_loss"], result["test_accuracy"]]),
    }


@functools.cache
def eager_and_exact(case: str) -> tuple[dict, dict]:
    exact = CASES[case] | {"precision": "64-true"}
    return train(loss="eager", **CASES[case]), train(loss="eager", **exact)


def stop_and_resume(folder: str, stop: int, steps: int, **options) -> tuple[dict, dict]:
    """A run, and the same run stopped and resumed from its checkpoint."""
    whole = train(steps=steps, **options)
    train(steps=stop, save=folder, **options)
    return whole, train(steps=steps, save=folder, resume=str(Path(folder, "last.ckpt")), **options)


def both_ranks(rank: int, size: int, folder: str) -> dict[str, dict]:
    os.environ["LOCAL_RANK"] = str(rank)  # as torchrun does: Lightning starts no processes then
    cases = {name: train(size, **options) for name, options in CASES.items()}
    # saved after the fifth batch, in the middle of the second epoch
    whole, resumed = stop_and_resume(folder, stop=3, steps=4, size=size, accumulate=2)
    return cases | {"whole": whole, "resumed": resumed}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, dict]:
    """The runs of two gloo processes, by case."""
    ranks = returned(launch(both_ranks, 2, str(tmp_path_factory.mktemp("checkpoints"))))
    return {name: runs.of_all_ranks([rank[name] for rank in ranks]) for name in ranks[0]}


@pytest.mark.parametrize("case", CASES)
def test_one_process_is_as_exact_as_eager(case):
    run = train(**CASES[case])
    runs.assert_as_exact_as_eager(run, *eager_and_exact(case))
    assert run["losses"].dtype == torch.float32
    assert run["losses"][-1] < run["losses"][0]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process_with_the_whole_batch(two_ranks, case):
    runs.assert_as_exact_as_eager(two_ranks[case], *eager_and_exact(case))
    if case != "bf16":  # where rounding may turn a prediction
        _, exact = eager_and_exact(case)
        assert two_ranks[case]["tested"][1].item() == pytest.approx(exact["tested"][1].item())


@pytest.mark.parametrize("stop", [2, 3, 4], ids=["first epoch", "its end", "second epoch"])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(tmp_path, stop):
    whole, resumed = stop_and_resume(str(tmp_path), stop, steps=5)
    assert len(resumed["losses"]) == len(whole["losses"]) - stop
    runs.assert_same(resumed, whole)


def test_two_ranks_resume_with_the_same_bits(two_ranks):
    assert 0 < len(two_ranks["resumed"]["losses"]) < len(two_ranks["whole"]["losses"])
    runs.assert_same(two_ranks["resumed"], two_ranks["whole"])


def test_a_checkpoint_loads_without_a_trainer(tmp_path):
    run = train(steps=1, save=str(tmp_path))
    model = Contrastive.load_from_checkpoint(tmp_path / "last.ckpt", tokenizer=runs.few_pairs()[2])
    for name, parameter in model.towers.named_parameters():
        assert torch.equal(parameter, run["parameters"][name]), name


def test_weight_decay_leaves_scale_and_bias_alone():
    model = Recorded(runs.few_pairs()[2], "fused", sgd=False)
    model.configure_model()
    optimizer = model.configure_optimizers()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    kept = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert kept == {"towers.loss.logit_scale", "towers.loss.logit_bias"}


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match=r"batch_size is 2000: .* at most 1437"):
        main(["--batch-size", "2000"])


def test_its_command_line_trains_on_two_processes_and_resumes(tmp_path):
    start = [sys.executable, "-m", "examples.train_lightning", "--devices", "2", "--save-every"]
    options = ["2", "--batch-size", "64", "--bf16", "--accumulate", "2", "--checkpoints"]
    tested = []
    for steps in (["--steps", "2"], ["--steps", "6", "--resume"]):
        output = runs.command_line(tmp_path, *start, *options, str(tmp_path / "saved"), *steps)
        step, loss = re.search(r"^step (\d+): test loss (\S+),", output, re.MULTILINE).groups()
        assert step == steps[1]
        tested.append(float(loss))
    assert tested[1] < tested[0]
