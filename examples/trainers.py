"""What the examples of Lightning and accelerate share: options, data, optimizer, evaluation."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from .captions import Split, Tokenizer, load_splits, tokenize_captions
from .training import LEARNING_RATE, TwoTowers, zero_shot_accuracy

SEED = 0
WEIGHT_DECAY = 0.1


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: expected at least 1")
    return value


def options(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"examples.{name}", description=description)
    parser.add_argument("--steps", type=positive, default=150, help="of the optimizer, in all")
    parser.add_argument("--batch-size", type=positive, default=256, help="of all processes")
    parser.add_argument("--accumulate", type=positive, default=1, help="batches a step")
    parser.add_argument("--bf16", action="store_true", help="train under bf16 autocast")
    parser.add_argument("--save-every", type=positive, default=25, help="steps between checkpoints")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("build", name), help="their folder"
    )
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint")
    return parser


def check_batch_size(batch_size: int, pairs: int, processes: int) -> None:
    if batch_size % processes or batch_size > pairs:
        raise ValueError(
            f"batch_size is {batch_size}: expected a multiple of {processes}, the number of "
            f"processes, and at most {pairs}, the number of pairs"
        )


def load_pairs(seed: int) -> tuple[TensorDataset, TensorDataset, Tokenizer]:
    """1437 pairs to train with and 360 to test on: each image with one caption of its digit.

    An item is an image (1, 8, 8), the tokens of a caption (words,), and the digit () both mean.
    """
    tokenizer, tokens = tokenize_captions()
    generator = torch.Generator().manual_seed(seed)

    def pair(split: Split) -> TensorDataset:
        choice = torch.randint(tokens.shape[1], split.digits.shape, generator=generator)
        return TensorDataset(split.images, tokens[split.digits, choice], split.digits)

    train, test = load_splits(seed)
    return pair(train), pair(test), tokenizer


def make_optimizer(model: TwoTowers) -> torch.optim.AdamW:
    """AdamW. Weight decay would pull scale and bias away from where the loss needs them: none."""
    apart = {f"loss.{name}" for name in model.loss.no_weight_decay()}
    groups = [
        {"params": [p for name, p in model.named_parameters() if name not in apart]},
        {"params": [p for name, p in model.named_parameters() if name in apart], "weight_decay": 0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


@torch.no_grad()
def evaluate(
    model: TwoTowers, tokenizer: Tokenizer, batch: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, float]:
    """Loss, and zero-shot accuracy (mean over the languages of the prompts), of this rank's rows.

    The loss is that of the group: to be averaged over the ranks. The accuracy is of these rows.
    """
    images, _, digits = batch
    accuracy = zero_shot_accuracy(model, tokenizer, Split(images, digits))
    return model(*batch), sum(accuracy.values()) / len(accuracy)
