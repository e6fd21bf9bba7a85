"""SigLipLoss and CachedSigLipLoss in sentence-transformers' own trainer, on small models."""

import pytest
import torch
from sentence_models import (
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
from sentence_runs import KINDS, ROUNDING, both, gradients, scale_and_bias, train, train_eager
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import nn

from fused_siglip.integrations.sentence_transformers import (
    CachedSigLipLoss,
    SigLipLoss,
)
from fused_siglip.testing import eager_siglip_loss
from fused_siglip.testing.rounding import UNIT_ROUNDOFF
from support.tolerances import error

torch.set_num_threads(1)


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
