"""The example of accelerate, in its Accelerator: against the eager loss, on two ranks, resumed."""

from __future__ import annotations

import functools
import os
import re
import sys

import digits_runs as runs
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import TensorDataset

from examples import train_accelerate as example
from examples.trainers import make_optimizer
from examples.training import TwoTowers
from support.processes import launch, returned

CASES = {
    "sgd": {"sgd": True},
    "adamw": {},
    "accumulation": {"sgd": True, "accumulate": 2},
    "bf16": {"sgd": True, "bf16": True},
    "bf16, mixed features": {"sgd": True, "bf16": True, "mixed": True},
    "bf16, loss outside": {"sgd": True, "bf16": True, "outside": True},
}


class MixedTowers(TwoTowers):
    """Under autocast float32 image features meet bfloat16 text features."""

    def encode_images(self, images):
        return super().encode_images(images).float()

    def encode_texts(self, tokens):
        return super().encode_texts(tokens).bfloat16()


class Features(nn.Module):
    """Towers without their loss, which is prepared beside them."""

    encode_images, encode_texts = TwoTowers.encode_images, TwoTowers.encode_texts

    def __init__(self, towers: TwoTowers):
        super().__init__()
        self.image, self.text = towers.image, towers.text

    def forward(self, images, tokens):
        return self.encode_images(images), self.encode_texts(tokens)


def forget_accelerators() -> None:
    """All of a process share one state, with one precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(
    loss: str = "fused",
    *,
    sgd: bool = False,
    accumulate: int = 1,
    bf16: bool = False,
    double: bool = False,
    mixed: bool = False,
    outside: bool = False,
    steps: int = 5,
    save: str | None = None,
    resume: str | None = None,
) -> dict:
    """What this process gets from the example's pieces with an Accelerator."""
    forget_accelerators()
    accelerator = example.make_accelerator(bf16, accumulate)
    train_pairs, test_pairs, tokenizer = runs.few_pairs()
    towers = (MixedTowers if mixed else TwoTowers)(
        len(tokenizer), runs.LOSSES[loss](group=dist.group.WORLD)
    )
    towers.load_state_dict(runs.first_weights(len(tokenizer)))
    if double:
        towers.double()
        train_pairs, test_pairs = (
            TensorDataset(pairs.tensors[0].double(), *pairs.tensors[1:])
            for pairs in (train_pairs, test_pairs)
        )
    optimizer, loader = accelerator.prepare(
        (runs.sgd if sgd else make_optimizer)(towers),
        example.make_loader(accelerator, train_pairs, runs.BATCH),
    )
    if outside:
        features, criterion = accelerator.prepare(Features(towers), towers.loss)

        def model(images, tokens, digits):
            both = features(images, tokens)
            assert {feature.dtype for feature in both} == {torch.float32}
            return criterion(*both, image_ids=digits, text_ids=digits)

    else:
        model = accelerator.prepare(towers)
    progress = example.Progress()
    accelerator.register_for_checkpointing(progress)
    if resume:
        accelerator.load_state(resume)
    losses = example.train(
        accelerator,
        model,
        optimizer,
        loader,
        progress,
        steps=steps,
        save_every=1 if save else steps + 1,
        checkpoints=save,
    )
    assert progress.step == steps
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "parameters": {name: p.detach() for name, p in towers.named_parameters()},
        "tested": torch.tensor(example.test(accelerator, towers, tokenizer, test_pairs)),
    }


@functools.cache
def eager_and_exact(case: str) -> tuple[dict, dict]:
    own = ("mixed", "outside")
    options = {name: value for name, value in CASES[case].items() if name not in own}
    exact = options | {"bf16": False, "double": True}
    return train("eager", **options), train("eager", **exact)


def stop_and_resume(folder: str, stop: int, steps: int, **options) -> tuple[dict, dict]:
    """A run, and the same run stopped and resumed from its checkpoint."""
    whole = train(steps=steps, **options)
    train(steps=stop, save=folder, **options)
    return whole, train(steps=steps, save=folder, resume=folder, **options)


def both_ranks(rank: int, size: int, folder: str) -> dict[str, dict]:
    # what torchrun sets
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    cases = {name: train(**options) for name, options in CASES.items()}
    # saved after the fifth batch, in the middle of the second epoch
    whole, resumed = stop_and_resume(folder, stop=3, steps=4, accumulate=2)
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
    assert run["losses"][-1] < run["losses"][0]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process_with_the_whole_batch(two_ranks, case):
    runs.assert_as_exact_as_eager(two_ranks[case], *eager_and_exact(case))
    if "bf16" not in case:  # where rounding may turn a prediction
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


def test_a_batch_larger_than_the_data_is_refused():
    forget_accelerators()
    with pytest.raises(ValueError, match=r"batch_size is 2000: .* at most 1437"):
        example.main(["--batch-size", "2000"])


def test_its_command_line_trains_on_two_processes_and_resumes(tmp_path):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    program = ["2", "-m", "examples.train_accelerate", "--save-every", "2", "--batch-size", "64"]
    options = ["--bf16", "--accumulate", "2", "--checkpoints", str(tmp_path / "saved")]
    tested = []
    for steps in (["--steps", "2"], ["--steps", "6", "--resume"]):
        output = runs.command_line(tmp_path, *start, *program, *options, *steps)
        step, loss = re.search(r"^step (\d+): test loss (\S+),", output, re.MULTILINE).groups()
        assert step == steps[1]
        tested.append(float(loss))
    assert tested[1] < tested[0]
