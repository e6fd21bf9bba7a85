"""SigLipLoss and CachedSigLipLoss in sentence-transformers' own trainer, on small models."""

import copy
import functools
import json
import os
import pickle
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from packaging.version import Version
from sentence_models import (
    HERE,
    EagerSigLipLoss,
    features,
    images,
    part,
    peak_extra_bytes,
    peak_step_bytes,
    sentences,
    tiny_model,
    tiny_towers,
    trainer,
)
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MatryoshkaLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import nn

from fused_siglip.integrations.sentence_transformers import (
    SCALE_AND_BIAS_FILE,
    CachedSigLipLoss,
    SigLipLoss,
)
from fused_siglip.testing import eager_siglip_loss
from fused_siglip.testing.rounding import UNIT_ROUNDOFF
from support.processes import launch, returned
from support.tolerances import error

KINDS = {"plain": SigLipLoss, "cached": lambda m, **o: CachedSigLipLoss(m, mini_batch_size=5, **o)}
both = pytest.mark.parametrize("kind", list(KINDS))

# of float64; before 6.2 the library multiplies cached gradients in float32
ROUNDING = 1e-12 if Version(version("sentence-transformers")) >= Version("6.2") else 1e-5

torch.set_num_threads(1)


def weights(model) -> torch.Tensor:
    """The encoder's weights, one vector."""
    named = (p for name, p in model.named_parameters() if name != "logit_scale_and_bias")
    return nn.utils.parameters_to_vector(named).detach().clone()


def scale_and_bias(loss) -> torch.Tensor:
    if isinstance(loss, EagerSigLipLoss):
        return torch.stack([loss.logit_scale, loss.logit_bias]).detach()
    model = getattr(loss.model, "module", loss.model)  # out of DDP
    return model.logit_scale_and_bias.detach().clone()


def gradients(loss, columns, scaling: float = 1.0) -> list[torch.Tensor]:
    """The loss, and the gradients of the encoder and of [t', b], of one step."""
    loss.zero_grad()
    value = loss(columns, None)
    (value * scaling).backward()
    named = dict(loss.named_parameters())
    if isinstance(loss, EagerSigLipLoss):
        own = torch.stack([named.pop("logit_scale").grad, named.pop("logit_bias").grad])
    else:
        own = named.pop("model.logit_scale_and_bias").grad.clone()
    encoder = torch.cat([p.grad.flatten() for p in named.values() if p.grad is not None])
    return [value.detach(), encoder, own]


def train(make_loss, dtype=torch.float32, **options):
    """Logged losses, and of the encoder and of [t', b]: (start, end)."""
    model = tiny_model().to(dtype)
    loss = make_loss(model).to(dtype)
    start = weights(model), scale_and_bias(loss)
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(folder, model, loss, **options)
        run.train()
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    ends = zip(start, (weights(model), scale_and_bias(loss)), strict=True)
    return torch.tensor(logged, dtype=torch.float64), *ends


@functools.cache
def train_eager(dtype, *options):
    return train(EagerSigLipLoss, dtype, **dict(options))


@both
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_trainer_equals_eager(kind, accumulate, bf16):
    options = {
        "gradient_accumulation_steps": accumulate,
        "max_grad_norm": 0,  # does not reach the eager loss's own parameters
    }
    ours, *trained = train(KINDS[kind], bf16=bf16, **options)
    eager, *eager_trained = train_eager(torch.float32, ("bf16", bf16), *options.items())
    exact, *exact_trained = train_eager(torch.float64, *options.items())
    assert exact[0] > 1.5 * exact[-1], "the model should learn something"

    # twice what the eager loss in this dtype is off after as many steps
    rounding = len(exact) * UNIT_ROUNDOFF[torch.float32]
    assert error(ours, exact) <= 2 * error(eager, exact) + rounding
    # how far the weights have moved, since a wrong gradient can hide behind a large weight
    for (a0, a1), (e0, e1), (x0, x1) in zip(trained, eager_trained, exact_trained, strict=True):
        moved = x1 - x0
        growth = (x1.abs().max() / moved.abs().max()).item()
        assert error(a1 - a0, moved) <= 2 * error(e1 - e0, moved) + rounding * growth


def test_weight_decay_spares_them_and_the_optimizer_has_them_once(tmp_path):
    model = tiny_model()
    loss = SigLipLoss(model)
    run = trainer(tmp_path, model, loss, weight_decay=0.1)
    groups = run.create_optimizer().param_groups
    decays = [
        group["weight_decay"]
        for group in groups
        for p in group["params"]
        if p is model.logit_scale_and_bias
    ]
    assert decays == [0.0]
    assert max(group["weight_decay"] for group in groups) == 0.1


@both
def test_every_gradient_follows_the_upstream_scale(kind):
    """What GradScaler and accumulation multiply the loss with: a power of two, so exactly."""
    model = tiny_model()
    loss = KINDS[kind](model)
    once, scaled = (gradients(loss, features(model, 12), scaling) for scaling in (1, 1024))
    for one, other in zip(once[1:], scaled[1:], strict=True):
        assert one.abs().max() > 0
        assert torch.equal(one * 1024, other)


def test_cached_accumulates_as_one_uncached_step():
    """Two cached backwards of halved losses: the gradient of the mean of two eager losses."""
    model, eager_model = tiny_model().double(), tiny_model().double()
    loss = CachedSigLipLoss(model, mini_batch_size=3).double()
    eager = EagerSigLipLoss(eager_model)
    columns = features(model, 16)
    halves = [[part(column, begin, begin + 8) for column in columns] for begin in (0, 8)]
    for half in halves:
        (loss(half, None) / 2).backward()
    (sum(eager([dict(c) for c in half]) for half in halves) / 2).backward()
    own = torch.stack([eager.logit_scale.grad, eager.logit_bias.grad])
    assert error(model.logit_scale_and_bias.grad, own) < ROUNDING
    largest = max(p.grad.abs().max() for p in eager_model.parameters() if p.grad is not None)
    for name, p in eager_model.named_parameters():
        if p.grad is not None:
            assert (model.get_parameter(name).grad - p.grad).abs().max() < ROUNDING * largest


@pytest.mark.parametrize("options", [{"mini_batch_size": 5}, {"mini_batch_num_tokens": 16}])
@pytest.mark.parametrize("columns", [2, 3])
def test_cached_equals_plain(options, columns):
    model, other = tiny_model(), tiny_model()
    plain, cached = SigLipLoss(model).double(), CachedSigLipLoss(other, **options).double()
    expected = gradients(plain, features(model, 13, columns))
    for a, e in zip(gradients(cached, features(model, 13, columns)), expected, strict=True):
        assert error(a, e) < ROUNDING


def test_cached_draws_the_same_dropout_again():
    """The gradients are those of the very embeddings the loss has seen, drawn mini-batch by
    mini-batch."""
    model = tiny_model(dropout=0.3)
    loss = CachedSigLipLoss(model, mini_batch_size=4).double()
    model.train()
    columns = features(model, 12)
    torch.manual_seed(7)
    cached = gradients(loss, [dict(c) for c in columns])

    other = tiny_model(dropout=0.3).double()
    eager = EagerSigLipLoss(other)
    other.train()
    torch.manual_seed(7)
    # trailing padding is cut off a mini-batch, which changes what dropout draws
    embeddings = []
    for column in columns:
        parts = []
        for begin in range(0, 12, 4):
            length = int(column["attention_mask"][begin : begin + 4].sum(1).max())
            rows = part(column, begin, begin + 4, length)
            parts.append(other(rows)["sentence_embedding"])
        embeddings.append(nn.functional.normalize(torch.cat(parts), dim=-1))
    value = eager_siglip_loss(*embeddings, eager.logit_scale.exp(), eager.logit_bias)
    value.backward()
    expected = [
        value.detach(),
        torch.cat([p.grad.flatten() for p in other.parameters() if p.grad is not None]),
        torch.stack([eager.logit_scale.grad, eager.logit_bias.grad]),
    ]
    for a, e in zip(cached, expected, strict=True):
        assert error(a, e) < ROUNDING


@both
def test_further_columns_are_negatives_of_every_anchor(kind):
    model = tiny_model()
    loss = KINDS[kind](model).double()
    columns = features(model, 6, columns=4)
    with torch.no_grad():
        x, *texts = (
            nn.functional.normalize(model(dict(c))["sentence_embedding"], dim=-1) for c in columns
        )
        z = scale_and_bias(loss)[0].exp() * x @ torch.cat(texts).T - 10
        sign = -torch.ones_like(z)
        sign[:, :6] += 2 * torch.eye(6)
        expected = -nn.functional.logsigmoid(sign * z).sum() / 6
    assert error(loss(columns, None).detach(), expected) < ROUNDING


@both
def test_images_and_texts(kind):
    model, other = tiny_towers(), tiny_towers()
    loss, eager = KINDS[kind](model).double(), EagerSigLipLoss(other).double()
    texts = sentences(8)["anchor"]
    ours, expected = (
        gradients(each, [m.preprocess(images(8)), m.preprocess(texts)])
        for each, m in ((loss, model), (eager, other))
    )
    for a, e in zip(ours, expected, strict=True):
        assert error(a, e) < ROUNDING


@both
def test_matryoshka(kind):
    model, peer = tiny_model(), tiny_model()
    ours = MatryoshkaLoss(model, KINDS[kind](model), [32, 8], [1.0, 0.5]).double()
    eager = EagerSigLipLoss(peer.double())
    theirs = MatryoshkaLoss(peer, eager, [32, 8], [1.0, 0.5])
    values = [loss(features(model, 8), None) for loss in (ours, theirs)]
    for value in values:
        value.backward()
    assert error(values[0].detach(), values[1].detach()) < ROUNDING
    own = torch.stack([eager.logit_scale.grad, eager.logit_bias.grad])
    assert error(model.logit_scale_and_bias.grad, own) < ROUNDING


@both
def test_evaluate(tmp_path, kind):
    model = tiny_model()
    loss = KINDS[kind](model)
    held_out = Dataset.from_dict(sentences(16))
    run = trainer(tmp_path, model, loss, steps=1, per_device_eval_batch_size=16)
    logged = run.evaluate(held_out)["eval_loss"]
    with torch.no_grad():
        expected = EagerSigLipLoss(tiny_model())(features(model, 16))
    assert logged == pytest.approx(expected.item(), rel=1e-5)
    # and the trained model still encodes as any other
    assert model.encode(["w1 w2"], output_value=None)[0].keys() == (
        tiny_model().encode(["w1 w2"], output_value=None)[0].keys()
    )


@both
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, kind):
    options = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 3}
    model = tiny_model()
    loss = KINDS[kind](model)
    trainer(tmp_path, model, loss, **options).train()

    again = tiny_model()
    loss_again = KINDS[kind](again)
    run = trainer(tmp_path, again, loss_again, **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(scale_and_bias(loss_again), scale_and_bias(loss))
    assert torch.equal(weights(again), weights(model))

    saved = json.loads((tmp_path / "checkpoint-3" / SCALE_AND_BIAS_FILE).read_text())
    assert saved["logit_scale"] != loss.init_logit_scale
    assert saved["logit_bias"] != pytest.approx(model.logit_scale_and_bias[1].item(), abs=1e-6)


def test_best_model_has_its_own_scale_and_bias(tmp_path):
    model = tiny_model()
    run = trainer(
        tmp_path,
        model,
        SigLipLoss(model),
        steps=4,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the first checkpoint is the best
        eval_dataset=Dataset.from_dict(sentences(16)),
    )
    run.train()
    best = run.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")
    saved = json.loads(Path(best, SCALE_AND_BIAS_FILE).read_text())
    assert model.logit_scale_and_bias.tolist() == [saved["logit_scale"], saved["logit_bias"]]


def test_resuming_without_saved_scale_and_bias_is_refused(tmp_path):
    model = tiny_model()
    trainer(
        tmp_path, model, SigLipLoss(model), steps=1, save_strategy="steps", save_steps=1
    ).train()
    (tmp_path / "checkpoint-1" / SCALE_AND_BIAS_FILE).unlink()
    run = trainer(tmp_path, model, SigLipLoss(model))
    with pytest.raises(RuntimeError, match="logit_scale_and_bias"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


PLAIN_LOAD = """
import sys
sys.modules["fused_siglip"] = None  # as if it were not installed
sys.path.insert(0, {here!r})
import torch
from torchvision_on_cpu import define_schemas
define_schemas()
from sentence_transformers import SentenceTransformer
model = SentenceTransformer({folder!r}, device="cpu")
assert type(model) is SentenceTransformer and not hasattr(model, "logit_scale_and_bias")
torch.save(model.encode(["w1 w2", "w3"], convert_to_tensor=True), {folder!r} + "/encoded.pt")
"""


def test_saved_model_loads_without_this_package(tmp_path):
    model = tiny_model()
    trainer(tmp_path / "run", model, SigLipLoss(model), steps=2).train()
    folder = str(tmp_path / "saved")
    model.save_pretrained(folder)
    program = PLAIN_LOAD.format(here=str(HERE), folder=folder)
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    encoded = model.encode(["w1 w2", "w3"], convert_to_tensor=True)
    assert torch.equal(torch.load(f"{folder}/encoded.pt"), encoded)
    assert "_Trained" not in Path(folder, "README.md").read_text()


def test_copies_and_pickles():
    model = tiny_model()
    loss = SigLipLoss(model, init_logit_bias=-7)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert torch.equal(other.logit_scale_and_bias, model.logit_scale_and_bias)
    pickle.dumps(type(model)._multi_process_worker)  # what encode's pool of processes starts
    assert isinstance(model, SentenceTransformer) and type(model).__name__ == "SentenceTransformer"
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert loss.model.logit_scale_and_bias.dtype == torch.float32


def test_model_init_starts_each_model_anew(tmp_path):
    made = []

    def make():
        made.append(tiny_model())
        return made[-1]

    run = trainer(tmp_path, None, lambda model: SigLipLoss(model, 2.0, -5.0), model_init=make)
    run.train()
    assert len(made) > 1 and run.model is made[-1]
    assert run.model.logit_scale_and_bias.tolist() != [2.0, -5.0]
    assert run.model.logit_scale_and_bias.detach().sub(torch.tensor([2.0, -5.0])).abs().max() < 1


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
    assert (own - torch.tensor([2.3026, -10])).abs().min() > 1e-4, "both have moved"


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


def test_memory_of_the_loss():
    """The library has no SigLIP loss: its softmax loss of the same scores, and eager SigLIP."""
    ours = peak_extra_bytes("SigLipLoss", 4096)
    assert 5 * ours < peak_extra_bytes("MultipleNegativesRankingLoss", 4096)
    assert 5 * ours < peak_extra_bytes("EagerSigLipLoss", 4096)


def test_memory_of_the_cached_step_is_the_mini_batches():
    # from 2048 rows on the loss's own panels do not grow
    cached = [peak_step_bytes("CachedSigLipLoss", n, mini_batch_size=16) for n in (2048, 4096)]
    plain = [peak_step_bytes("SigLipLoss", n) for n in (256, 1024)]
    per_row, plain_per_row = (cached[1] - cached[0]) / 2048, (plain[1] - plain[0]) / 768
    assert per_row < plain_per_row / 20
    large, small = (
        peak_step_bytes("CachedSigLipLoss", 1024, mini_batch_size=size) for size in (256, 16)
    )
    assert large > 2 * small


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda m: SigLipLoss(nn.Linear(2, 2)), TypeError, "model is a Linear: expected a Sent"),
        (lambda m: SigLipLoss(m, "10"), TypeError, "init_logit_scale is a str: expected a number"),
        (lambda m: SigLipLoss(m, 1.0, float("nan")), ValueError, "init_logit_bias is nan"),
        (lambda m: CachedSigLipLoss(m, mini_batch_size=0), ValueError, "mini_batch_size is 0"),
        (lambda m: CachedSigLipLoss(m, mini_batch_num_tokens=0), ValueError, "tokens is 0"),
        (lambda m: SigLipLoss(m)(features(m, 4)[:1], None), ValueError, "has 1 input column"),
        (lambda m: CachedSigLipLoss(m)([], None), ValueError, "has 0 input column"),
    ],
)
def test_bad_arguments(make, kind, message):
    with pytest.raises(kind, match=message):
        make(tiny_model())


def test_static_embeddings():
    static = StaticEmbedding(tiny_model().tokenizer, embedding_dim=16)
    model = SentenceTransformer(modules=[static], device="cpu")
    assert SigLipLoss(model)(features(model, 4), None).isfinite()
    with pytest.raises(ValueError, match="StaticEmbedding"):
        CachedSigLipLoss(model)


@both
def test_made_after_the_model_was_prepared(kind):
    model = tiny_model()
    model.forward = model.forward  # as accelerate's prepare pins it
    loss = KINDS[kind](model)
    with pytest.raises(RuntimeError, match="made before the model is wrapped"):
        loss(features(model, 4), None)


class Halves(nn.DataParallel):
    """What DataParallel does on two GPUs: halves of the rows, outputs strung together."""

    def forward(self, input):
        rows = len(input["input_ids"])
        request = input.get("siglip_request")
        halves = [part(input, begin, begin + rows // 2) for begin in (0, rows // 2)]
        for i, half in enumerate(halves):
            if request is not None:
                half["siglip_request"] = [e[i * rows // 2 : (i + 1) * rows // 2] for e in request]
        outputs = [self.module(half) for half in halves]
        tensors = {k for k, v in outputs[0].items() if isinstance(v, torch.Tensor)}
        return {key: torch.cat([output[key] for output in outputs]) for key in tensors}


def test_data_parallel():
    model, other = tiny_model(), tiny_model()
    loss, expected = SigLipLoss(model).double(), SigLipLoss(other).double()
    loss.model = Halves(model)
    loss(features(model, 8), None).backward()
    expected(features(other, 8), None).backward()
    assert error(model.logit_scale_and_bias.grad, other.logit_scale_and_bias.grad) < ROUNDING

    cached = CachedSigLipLoss(model)
    cached.model = Halves(model)
    with pytest.raises(ValueError, match="under DataParallel: expected one process a device"):
        cached(features(model, 8), None)


def test_positives_of_another_number():
    model = tiny_model()
    anchors, positives, negatives = features(model, 6, columns=3)
    with pytest.raises(ValueError, match="6 anchors have 4 positives: expected one each"):
        SigLipLoss(model)([anchors, part(positives, 0, 4), negatives], None)
