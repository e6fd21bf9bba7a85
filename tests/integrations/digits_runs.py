"""What the tests of Lightning and accelerate share: few pairs, first weights, and how two runs are
compared.

A run is {"losses": (batches,), "parameters": {name: tensor}, "tested": (loss, accuracy)}.
"""

from __future__ import annotations

import torch
from helpers import UNIT_ROUNDOFF, error
from torch import Tensor
from torch.utils.data import TensorDataset

from examples.captions import Tokenizer
from examples.trainers import SEED, load_pairs
from examples.training import EagerSigLipLoss, TwoTowers
from fused_siglip import LearnableSigLipLoss

BATCH = 16  # of all ranks
BATCHES = 3  # of an epoch: 5 pairs are left over
TEST_PAIRS = 21  # an odd number: two ranks test different numbers of rows
LOSSES = {"fused": LearnableSigLipLoss, "eager": lambda group: EagerSigLipLoss()}


def few_pairs() -> tuple[TensorDataset, TensorDataset, Tokenizer]:
    train, test, tokenizer = load_pairs(SEED)
    return (
        TensorDataset(*train[: BATCHES * BATCH + 5]),
        TensorDataset(*test[:TEST_PAIRS]),
        tokenizer,
    )


def first_weights(vocabulary: int) -> dict[str, Tensor]:
    """Drawn in float32: the same values for a run in float64."""
    torch.manual_seed(SEED)
    return TwoTowers(vocabulary, LearnableSigLipLoss()).state_dict()


def plain_optimizer(model: TwoTowers) -> torch.optim.SGD:
    """Unlike Adam's, its steps show a gradient that is too large by a factor."""
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def one_of(ranks: list[dict]) -> dict:
    """The run of all ranks: the mean of their losses; the parameters must be the same bits."""
    first = ranks[0]
    for other in ranks[1:]:
        assert_same_parameters(other, first)
        assert torch.equal(other["tested"], first["tested"])
    return first | {"losses": torch.stack([run["losses"] for run in ranks]).mean(dim=0)}


def assert_same_parameters(run: dict, expected: dict) -> None:
    assert run["parameters"].keys() == expected["parameters"].keys()
    for name, value in run["parameters"].items():
        assert torch.equal(value, expected["parameters"][name]), name


def assert_as_exact_as_eager(run: dict, eager: dict, exact: dict) -> None:
    """Hold every loss and parameter to the run in float64, within the eager run's own error."""
    def rows(of):
        return {"losses": of["losses"], "tested": of["tested"][:1], **of["parameters"]}
    for name, x in rows(exact).items():
        print(f"{name:20} fused {error(rows(run)[name], x):.2e} eager {error(rows(eager)[name], x):.2e}")
