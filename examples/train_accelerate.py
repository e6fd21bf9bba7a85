"""Train two small towers on handwritten digits with accelerate, on the loss of the global batch.

    torchrun --nproc-per-node 2 -m examples.train_accelerate
    torchrun --nproc-per-node 2 -m examples.train_accelerate --steps 300 --resume

Processes on a CPU, with gloo; ``accelerate launch --cpu`` starts only one, whatever its
``--num_processes``. The data are scikit-learn's digits with captions, as in examples/captions.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from fused_siglip import LearnableSigLipLoss

from .captions import Tokenizer
from .trainers import SEED, check_batch_size, evaluate, load_pairs, make_optimizer, options
from .training import TwoTowers


@dataclass
class Progress:
    """How far training is: saved with the checkpoint."""

    step: int = 0  # of the optimizer
    epoch: int = 0
    batch: int = 0  # of the epoch

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]


def make_accelerator(bf16: bool, accumulate: int) -> Accelerator:
    return Accelerator(
        cpu=True,
        mixed_precision="bf16" if bf16 else "no",
        gradient_accumulation_steps=accumulate,
        # every process takes its slice of a global batch, which is the same on any number of them
        dataloader_config=DataLoaderConfiguration(
            split_batches=True, use_seedable_sampler=True, data_seed=SEED
        ),
    )


def make_loader(accelerator: Accelerator, pairs: TensorDataset, batch_size: int) -> DataLoader:
    check_batch_size(batch_size, len(pairs), accelerator.num_processes)
    # Only full batches: of a shorter one the last ranks would get nothing, not even the call of
    # the loss that the others wait for.
    return DataLoader(pairs, batch_size, shuffle=True, drop_last=True)


def train(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    progress: Progress,
    *,
    steps: int,
    save_every: int,
    checkpoints: Path,
) -> list[float]:
    """Train up to ``steps`` steps in all; the loss of every global batch on the way."""
    losses = []
    bar = tqdm(
        total=steps, initial=progress.step, unit="step", disable=not accelerator.is_main_process
    )
    while progress.step < steps:
        loader.set_epoch(progress.epoch)
        for batch in accelerator.skip_first_batches(loader, progress.batch):
            with accelerator.accumulate(model):
                loss = model(*batch)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            # the mean over the ranks is the loss of the global batch
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            progress.batch += 1
            if not accelerator.sync_gradients:
                continue
            progress.step += 1
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            if progress.step % save_every == 0:
                accelerator.save_state(checkpoints)
            if progress.step == steps:
                break
        else:
            progress.epoch, progress.batch = progress.epoch + 1, 0
    bar.close()
    return losses


def test(
    accelerator: Accelerator, model: nn.Module, tokenizer: Tokenizer, pairs: TensorDataset
) -> tuple[float, float]:
    """Loss and zero-shot accuracy on all test pairs: every rank takes its rows, none twice."""
    rows = pairs[accelerator.process_index :: accelerator.num_processes]
    with accelerator.autocast():
        loss, accuracy = evaluate(accelerator.unwrap_model(model), tokenizer, rows)
    # losses count alike, accuracies by their rows
    share = len(rows[0]) / len(pairs)
    sums = torch.stack([loss / accelerator.num_processes, loss.new_tensor(accuracy * share)])
    return tuple(accelerator.reduce(sums, "sum").tolist())


def main(arguments: Sequence[str] | None = None) -> None:
    args = options("train_accelerate", __doc__.split("\n")[0]).parse_args(arguments)
    accelerator = make_accelerator(args.bf16, args.accumulate)
    set_seed(SEED)  # every process draws the same first weights
    train_pairs, test_pairs, tokenizer = load_pairs(SEED)

    # The process group exists since Accelerator(); WORLD is None where there is none.
    model = TwoTowers(len(tokenizer), LearnableSigLipLoss(group=dist.group.WORLD))
    progress = Progress()
    model, optimizer, loader = accelerator.prepare(
        model, make_optimizer(model), make_loader(accelerator, train_pairs, args.batch_size)
    )
    accelerator.register_for_checkpointing(progress)
    if args.resume:
        accelerator.load_state(args.checkpoints)
    train(
        accelerator,
        model,
        optimizer,
        loader,
        progress,
        steps=args.steps,
        save_every=args.save_every,
        checkpoints=args.checkpoints,
    )
    loss, accuracy = test(accelerator, model, tokenizer, test_pairs)
    accelerator.print(
        f"step {progress.step}: test loss {loss:.9g}, zero-shot accuracy {accuracy:.1%}"
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
