"""What the tests of Lightning and accelerate share: a few pairs, first weights, how runs compare.

A run is {"losses": (batches,), "parameters": {name: tensor}, "tested": (loss, accuracy)}.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from examples.captions import Tokenizer
from examples.trainers import SEED, load_pairs
from examples.training import TwoTowers
from fused_siglip import LearnableSigLipLoss
from fused_siglip.testing import eager_siglip_loss
from fused_siglip.testing.rounding import UNIT_ROUNDOFF
from support.launched import run_ranks
from support.tolerances import error


class EagerSigLipLoss(LearnableSigLipLoss):
    """The same scale and bias in the eager loss, which knows no group: that of this process."""

    def __init__(self):
        super().__init__()

    def forward(
        self,
        image_features: Tensor,  # (M, D)
        text_features: Tensor,  # (N, D)
        *,
        image_ids: Tensor,  # (M,)
        text_ids: Tensor,  # (N,)
    ) -> Tensor:  # ()
        # without a dimension, as open_clip's parameters are: they do not widen half precision
        scalars = self.factor().squeeze(), self.logit_bias.squeeze()
        ids = {"image_ids": image_ids, "text_ids": text_ids}
        return eager_siglip_loss(image_features, text_features, *scalars, **ids)


ROOT = Path(__file__).resolve().parents[2]
BATCH = 16  # of all ranks
PAIRS = 53  # three batches an epoch, and 5 pairs left over
TEST_PAIRS = 21  # an odd number: two ranks test different numbers of rows
LOSSES = {"fused": LearnableSigLipLoss, "eager": lambda group: EagerSigLipLoss()}


def few_pairs() -> tuple[TensorDataset, TensorDataset, Tokenizer]:
    train, test, tokenizer = load_pairs(SEED)
    return TensorDataset(*train[:PAIRS]), TensorDataset(*test[:TEST_PAIRS]), tokenizer


def first_weights(vocabulary: int) -> dict[str, Tensor]:
    """Drawn in float32, also for a run in float64."""
    torch.manual_seed(SEED)
    return TwoTowers(vocabulary, LearnableSigLipLoss()).state_dict()


def sgd(model: torch.nn.Module) -> torch.optim.SGD:
    """Its steps show a gradient that is too large by a factor; Adam's do not."""
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def assert_same(run: dict, expected: dict) -> None:
    """The same bits: parameters and test results, and the losses of the batches both have."""
    for name, value in expected["parameters"].items():
        assert torch.equal(run["parameters"][name], value), name
    assert torch.equal(run["tested"], expected["tested"])
    count = min(len(run["losses"]), len(expected["losses"]))
    assert count > 0
    assert torch.equal(run["losses"][-count:], expected["losses"][-count:])


def of_all_ranks(ranks: list[dict]) -> dict:
    """The run of the group, from each rank's: they must have ended with the same parameters."""
    losses = torch.stack([run["losses"] for run in ranks]).mean(dim=0)
    whole = ranks[0] | {"losses": losses}
    for run in ranks:
        assert_same(run | {"losses": losses}, whole)
    return whole


def assert_as_exact_as_eager(run: dict, eager: dict, exact: dict) -> None:
    """Hold a run to the one in float64, within the error of the eager run in the same precision.

    Twice that error, since both are a draw of rounding errors; and never less than one rounding of
    a float32 number a step, since a single number can be exact by luck.
    """
    rounding = len(exact["losses"]) * UNIT_ROUNDOFF[torch.float32]

    def values(of: dict) -> dict[str, Tensor]:
        return {"loss": of["losses"], "test loss": of["tested"][0], **of["parameters"]}

    assert values(run).keys() == values(exact).keys()
    for name, x in values(exact).items():
        found, allowed = error(values(run)[name], x), 2 * error(values(eager)[name], x)
        assert found <= max(allowed, rounding), f"{name}: {found:.2e}, allowed {allowed:.2e}"


def command_line(folder: Path, *arguments: str) -> str:
    """Standard output of a program of this environment, started from the root of the repository."""
    # a stack imports torchvision in processes of its own: conftest.py does not reach those
    site = folder / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(
        "from torchvision_on_cpu import define_schemas\ndefine_schemas()\n"
    )
    path = os.pathsep.join([str(site), str(Path(__file__).parent)])
    return run_ranks(
        arguments,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=180,
    )
