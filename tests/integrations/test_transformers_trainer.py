"""Patched models in transformers' Trainer and under DDP, beside unpatched ones."""

import copy
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from tiny_siglip import assert_as_exact_as_own, cast, make_batch, make_model
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from fused_siglip.integrations.transformers import patch_siglip, unpatch_siglip
from support.processes import launch, returned
from support.tolerances import error

PAIRS, EVAL_PAIRS = 28, 20


class Pairs(Dataset):
    """Random pairs, with a column that is none of the model's arguments."""

    def __init__(self, name: str, size: int, seed: int):
        self.batch = make_batch(name, size, seed)
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict:
        return {key: value[i] for key, value in self.batch.items()} | {"url": f"image {i}"}


class Recorder(Trainer):
    """Trainer that keeps what its training steps return."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def run(
    directory,
    name: str = "siglip",
    *,
    patch: dict | None = None,
    dtype: torch.dtype = torch.float32,
    compute_metrics=None,
    labels: bool = False,
    **arguments,
) -> dict[str, torch.Tensor]:
    """Train a tiny model and evaluate it: losses, what every parameter moved by, eval_loss.

    patch: options of patch_siglip, None for a model as it is. labels: a column that nobody reads.
    """
    model = make_model(name).to(dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    if patch is not None:
        patch_siglip(model, **patch)

    def collate(rows: list[dict]) -> dict:
        assert "url" not in rows[0]  # Trainer still knows the columns of forward
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        if labels:
            batch["labels"] = torch.arange(len(rows))
        return cast(batch, dtype) | {"return_loss": True}

    sizes = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
    arguments = sizes | {"num_train_epochs": 2, "logging_steps": 1} | arguments
    trainer = Recorder(
        model,
        TrainingArguments(
            directory,
            optim="sgd",
            learning_rate=0.1,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=Pairs(name, PAIRS, seed=1),
        eval_dataset=Pairs(name, EVAL_PAIRS, seed=2),
        data_collator=collate,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    eval_loss = trainer.evaluate()["eval_loss"]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    moved = {n: p.detach() - before[n] for n, p in model.named_parameters()}
    assert all(m.abs().max() > 0 for m in moved.values())
    return {
        "losses": torch.tensor(trainer.losses),
        "logged": torch.tensor(logged),
        "eval_loss": torch.tensor(eval_loss),
    } | moved


# 28 pairs by 8: the last batch of an epoch has 4, the last accumulation one batch
CASES = {
    "fp32": {},
    "bf16": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "siglip2": {"name": "siglip2"},
    "siglip2 bf16 accumulation": {
        "name": "siglip2",
        "bf16": True,
        "gradient_accumulation_steps": 3,
    },
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_trains_and_evaluates_as_unpatched(case, tmp_path):
    own = run(tmp_path, **case)
    actual = run(tmp_path, patch={}, **case)
    plain = {"bf16": False, "torch_compile": False}
    exact = run(tmp_path, dtype=torch.float64, **(case | plain))
    assert len(actual["losses"]) == 8
    assert_as_exact_as_own(actual, own, exact)


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_column_of_labels_changes_nothing(name, accumulate, tmp_path):
    """Trainer would leave the loss of accumulated batches undivided: forward takes **kwargs."""
    case = {"name": name, "patch": {}, "gradient_accumulation_steps": accumulate}
    plain, labelled = (run(tmp_path, labels=labels, **case) for labels in (False, True))
    assert all(torch.equal(labelled[key], value) for key, value in plain.items())


def test_a_column_of_labels_and_a_patched_class(tmp_path):
    plain = run(tmp_path, patch={}, gradient_accumulation_steps=2)
    model_class = type(make_model())
    patch_siglip(model_class)
    try:
        labelled = run(tmp_path, labels=True, gradient_accumulation_steps=2)
    finally:
        unpatch_siglip(model_class)
    assert all(torch.equal(labelled[key], value) for key, value in plain.items())
    assert not hasattr(model_class, "accepts_loss_kwargs")
    assert not hasattr(unpatch_siglip(patch_siglip(make_model())), "accepts_loss_kwargs")


def test_compute_metrics_gets_the_embeddings(tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions)
        return {}

    own = run(tmp_path, compute_metrics=compute_metrics)
    actual = run(tmp_path, patch={}, compute_metrics=compute_metrics)
    assert error(actual["eval_loss"], own["eval_loss"].double()) <= 1e-5
    (*_, text, image, _, _), (text_embeds, image_embeds, text_output, image_output) = seen
    assert len(seen[0]) == len(seen[1]) + 2  # the logits
    assert text.shape == text_embeds.shape == (EVAL_PAIRS, 32)
    assert image.shape == image_embeds.shape
    for output in (text_output, image_output):
        assert output["last_hidden_state"].shape[0] == EVAL_PAIRS


# --- the global batch ---


def run_as_rank(rank: int, world_size: int, directory: str, cases: list[dict]) -> list[dict]:
    """Trainer on one of the ranks, which share out the batch of the run on one."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",  # never opened: the group is there already
    }
    size = 8 // world_size
    sizes = {"per_device_train_batch_size": size, "per_device_eval_batch_size": size}
    return [run(directory, **sizes, **case) for case in cases]


def test_trainer_on_two_ranks_is_trainer_on_one_with_the_whole_batch(tmp_path):
    # without drop_last accelerate fills the last batches up with pairs of the first ones
    cases = [
        {"dataloader_drop_last": True},
        {"dataloader_drop_last": True, "bf16": True, "gradient_accumulation_steps": 3},
    ]
    patched = [case | {"patch": {"group": "world"}} for case in cases]
    local = cases[0] | {"patch": {}}
    labelled = patched[1] | {"labels": True}
    runs = [*patched, labelled, local]
    ranks = returned(launch(run_as_rank, 2, str(tmp_path), runs, limit=400))
    for results in ranks:
        for key, value in results[1].items():
            assert torch.equal(results[2][key], value)
    for k, case in enumerate(cases):
        own = run(tmp_path, **case)
        exact = run(tmp_path, dtype=torch.float64, **(case | {"bf16": False}))
        # what a training step returns is the rank's own share
        mean = (ranks[0][k]["losses"] + ranks[1][k]["losses"]) / 2
        for results in ranks:
            assert_as_exact_as_own(results[k] | {"losses": mean}, own, exact)
    # with the loss of each rank's own batch it would be another training
    assert error(ranks[0][-1]["logged"], run(tmp_path, **cases[0])["logged"].double()) > 1e-2


WRAPPERS = {
    "ddp": nn.parallel.DistributedDataParallel,
    "compiled ddp": lambda model: nn.parallel.DistributedDataParallel(
        torch.compile(model, backend="aot_eager", fullgraph=True)
    ),
    "fully_shard": lambda model: dist.fsdp.fully_shard(model),
}


def loss_and_grads(model, batch: dict) -> dict[str, torch.Tensor]:
    loss = model(**batch, return_loss=True).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach()} | grads


def global_steps(rank: int, world_size: int, cases: list[tuple]) -> list[dict]:
    """On every rank: the mean loss over the ranks, and the gradients after DDP's averaging."""
    results = []
    for name, wrap, rows, options in cases:
        if options.get("group") == "process group":
            options = options | {"group": dist.group.WORLD}
        model = WRAPPERS[wrap](patch_siglip(make_model(name).double(), **options))
        batch = cast(make_batch(name, sum(rows)), torch.float64)
        mine = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
        values = loss_and_grads(model, {key: value[mine] for key, value in batch.items()})
        dist.all_reduce(values["loss"])
        values["loss"] /= world_size
        results.append(
            {
                key.removeprefix("module.").removeprefix("_orig_mod."): (
                    value.full_tensor() if hasattr(value, "full_tensor") else value
                )
                for key, value in values.items()
            }
        )
    return results


# model, wrapper, pairs on each rank, options
STEPS = [
    ("siglip", "ddp", [4, 4], {"group": "world"}),
    ("siglip", "ddp", [7, 1], {"group": "world"}),
    ("siglip", "ddp", [5, 3], {"group": "process group"}),
    ("siglip", "compiled ddp", [5, 3], {"group": "world", "dist_impl": "ring"}),
    ("siglip", "fully_shard", [5, 3], {"group": "world"}),
    ("siglip2", "ddp", [2, 4], {"dist_impl": "gather"}),
]


def test_loss_and_gradients_of_the_global_batch():
    ranks = returned(launch(global_steps, 2, STEPS, limit=400))
    for k, (name, _, rows, _) in enumerate(STEPS):
        batch = make_batch(name, sum(rows))
        own = loss_and_grads(make_model(name), batch)
        exact = loss_and_grads(make_model(name).double(), cast(batch, torch.float64))
        for results in ranks:
            actual = results[k]
            assert actual.keys() == exact.keys()
            if name == "siglip2":  # on a CPU it resizes these in float32
                resized = "vision_model.embeddings.position_embedding.weight"
                values = [{resized: v[resized]} for v in (actual, own, exact)]
                assert_as_exact_as_own(*values)
                actual[resized] = exact[resized]
            assert_as_exact_as_own(actual, own, exact, torch.float64)


def copies(rank: int, world_size: int) -> None:
    """A copy error_ratios the process group of its model, a pickle finds it by its name."""
    sub = dist.new_group([0, 1])
    batch = {key: value[rank : rank + 2] for key, value in make_batch("siglip", 3).items()}
    loss = patch_siglip(make_model(), group="world")(**batch, return_loss=True).loss
    for group in ("world", dist.group.WORLD, sub):
        model = copy.deepcopy(patch_siglip(make_model(), group=group))
        for again in (model, pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(again(**batch, return_loss=True).loss, loss)
    alone = unpatch_siglip(model)(**batch, return_loss=True).loss
    assert abs(loss - alone) > 1e-2


def test_copies_in_a_process_group():
    returned(launch(copies, 2))


def patched_before(rank: int, world_size: int, world, none) -> None:
    batch = {key: value[rank : rank + 2] for key, value in make_batch("siglip", 3).items()}
    expected = patch_siglip(make_model(), group=dist.group.WORLD)(**batch, return_loss=True).loss
    assert torch.equal(world(**batch, return_loss=True).loss, expected)
    with pytest.raises(ValueError, match="None before init_process_group"):
        none(**batch, return_loss=True)


def test_patched_before_the_process_group():
    models = (patch_siglip(make_model(), group=g) for g in ("world", dist.group.WORLD))
    returned(launch(patched_before, 2, *models))


def test_one_process_is_the_world():
    batch = make_batch("siglip", 4)
    alone = patch_siglip(make_model())(**batch, return_loss=True).loss
    for options in ({"group": "world"}, {"group": "world", "dist_impl": "ring"}):
        model = patch_siglip(make_model(), **options)
        assert torch.equal(model(**batch, return_loss=True).loss, alone)
