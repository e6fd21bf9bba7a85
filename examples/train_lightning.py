"""Train two small towers on handwritten digits with Lightning, on the loss of the global batch.

    python -m examples.train_lightning --devices 2
    python -m examples.train_lightning --devices 2 --steps 300 --resume

Processes on a CPU, with gloo. The data are scikit-learn's digits with captions, as in
examples/captions.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from fused_siglip import LearnableSigLipLoss

from .captions import Tokenizer
from .trainers import (
    SEED,
    check_batch_size,
    evaluate,
    load_pairs,
    make_optimizer,
    options,
    positive,
)
from .training import TwoTowers


class Contrastive(L.LightningModule):
    def __init__(
        self, tokenizer: Tokenizer, make_loss: Callable[..., nn.Module] = LearnableSigLipLoss
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.make_loss = make_loss
        self.towers = None

    def configure_model(self) -> None:
        """Lightning's hook for building the model when its process group exists."""
        if self.towers is None:
            # every process draws the same first weights; WORLD is None where there is no group
            self.towers = TwoTowers(len(self.tokenizer), self.make_loss(group=dist.group.WORLD))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.towers)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], _) -> Tensor:
        loss = self.towers(*batch)
        # sync_dist averages over the ranks: what is shown is the loss of the global batch
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], _) -> None:
        loss, accuracy = evaluate(self.towers, self.tokenizer, batch)
        # Ranks' losses count alike, accuracies by their rows: as shares of a sum, since Lightning's
        # mean divides by the ranks' mean batch_size rounded down (10, where they have 11 and 10).
        self.log("test_loss", loss, batch_size=1, sync_dist=True)
        share = len(batch[0]) / len(self.trainer.datamodule.test)
        self.log("test_accuracy", accuracy * share, reduce_fx="sum", sync_dist=True)


class ResumableLoader(DataLoader):
    """A loader with a state, which Lightning saves: training resumes in the middle of an epoch.

    Without one Lightning would start the epoch's data again.
    """

    taken = 0  # batches of this epoch that were given out
    skip = 0  # of the next one that were given out before the checkpoint

    def __iter__(self) -> Iterator:
        skip, self.skip = self.skip, 0
        for self.taken, batch in enumerate(super().__iter__(), start=1):
            if self.taken > skip:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["taken"] % len(self)


class Pairs(L.LightningDataModule):
    """Each rank's share of the pairs; the global batches are the same on any number of ranks."""

    def __init__(self, train: TensorDataset, test: TensorDataset, batch_size: int):
        super().__init__()
        self.train, self.test, self.batch_size = train, test, batch_size

    def train_dataloader(self) -> DataLoader:
        rank, size = self.trainer.global_rank, self.trainer.world_size
        check_batch_size(self.batch_size, len(self.train), size)
        sampler = DistributedSampler(self.train, size, rank, seed=SEED)
        # Only full batches: a loss summed over the texts has another size when they are fewer.
        return ResumableLoader(self.train, self.batch_size // size, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """One batch, of every rank's rows of the test pairs: none twice, whatever their number."""
        rows = range(self.trainer.global_rank, len(self.test), self.trainer.world_size)
        return DataLoader(Subset(self.test, rows), batch_size=len(rows))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options("train_lightning", __doc__.split("\n")[0])
    parser.add_argument("--devices", type=positive, default=1, help="processes")
    args = parser.parse_args(arguments)

    L.seed_everything(SEED)
    train, test, tokenizer = load_pairs(SEED)
    checkpoints = ModelCheckpoint(
        args.checkpoints,
        filename="last",
        every_n_train_steps=args.save_every,
        enable_version_counter=False,  # one file, written anew
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=args.devices,
        strategy=DDPStrategy(process_group_backend="gloo") if args.devices > 1 else "auto",
        precision="bf16-mixed" if args.bf16 else "32-true",
        max_epochs=-1,
        max_steps=args.steps,
        accumulate_grad_batches=args.accumulate,
        use_distributed_sampler=False,  # Pairs has its own
        callbacks=[checkpoints],
        logger=False,
        enable_model_summary=False,
    )
    model, pairs = Contrastive(tokenizer), Pairs(train, test, args.batch_size)
    trainer.fit(model, pairs, ckpt_path=args.checkpoints / "last.ckpt" if args.resume else None)
    (result,) = trainer.validate(model, pairs, verbose=False)
    if trainer.is_global_zero:
        print(
            f"step {trainer.global_step}: test loss {result['test_loss']:.9g}, "
            f"zero-shot accuracy {result['test_accuracy']:.1%}"
        )


if __name__ == "__main__":
    main()
