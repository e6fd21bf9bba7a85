"""Losses of sentence-transformers with targets, weights of positives, and weights from labels."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from datasets import Dataset
from sentence_models import features, part, sentences, tiny_model, trainer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import nn

from fused_siglip import PositiveTarget, PositiveWeight
from fused_siglip.integrations.sentence_transformers import CachedSigLipLoss, SigLipLoss
from fused_siglip.testing import eager_siglip_loss
from support.processes import launch, returned
from support.tolerances import error

KINDS: dict[str, Callable] = {
    "plain": SigLipLoss,
    "cached": lambda model, **o: CachedSigLipLoss(model, mini_batch_size=3, **o),
}
both = pytest.mark.parametrize("kind", list(KINDS))
SETTINGS = [
    {"positives": PositiveWeight(3.0)},
    {"positives": PositiveTarget(0.9), "label_smoothing": 0.1},
    {"label_smoothing": 0.2, "weights_from_labels": True},
]

torch.set_num_threads(1)


def weights(count: int) -> torch.Tensor:
    return 2 * torch.rand(count, generator=torch.Generator().manual_seed(3))


def eager(model, columns, labels, settings: dict, dim: int | None = None):
    """The loss, with autograd through the model; t' and b as the losses start."""
    options = dict(settings)
    if options.pop("weights_from_labels", False):
        options["image_weights"] = labels
    embeddings = [model(dict(column))["sentence_embedding"][:, :dim] for column in columns]
    anchors, *texts = (nn.functional.normalize(e, dim=-1) for e in embeddings)
    ids = torch.arange(len(torch.cat(texts)))
    t, b = (torch.tensor(v).double().requires_grad_() for v in (math.log(10), -10.0))
    loss = eager_siglip_loss(
        anchors, torch.cat(texts), t.exp(), b,
        image_ids=ids[: len(anchors)], text_ids=ids, **options,
    )  # fmt: skip
    return loss, (t, b)


def encoder_grads(model) -> torch.Tensor:
    named = model.named_parameters()
    return torch.cat(
        [p.grad.flatten() for n, p in named if p.grad is not None and "logit" not in n]
    )


@both
@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_loss_and_gradients(kind, columns, settings):
    model, peer = tiny_model().double(), tiny_model().double()
    batch, labels = features(model, 7, columns), weights(7)
    value = KINDS[kind](model, **settings).double()([dict(c) for c in batch], labels)
    value.backward()
    expected, own = eager(peer, batch, labels, settings)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert error(encoder_grads(model), encoder_grads(peer)) < 1e-10
    grads = torch.stack([p.grad for p in own])
    assert error(model.logit_scale_and_bias.grad, grads) < 1e-11


@both
def test_weights_inside_matryoshka(kind):
    model, peer, settings = tiny_model().double(), tiny_model().double(), SETTINGS[2]
    batch, labels = features(model, 7), weights(7)
    loss = MatryoshkaLoss(model, KINDS[kind](model, **settings).double(), [32, 8])
    loss([dict(c) for c in batch], labels).backward()
    sum(eager(peer, batch, labels, settings, dim)[0] for dim in (32, 8)).backward()
    assert error(encoder_grads(model), encoder_grads(peer)) < 1e-10


@both
def test_the_trainer_hands_over_its_score_column(kind, tmp_path):
    """With weight 0 it does not matter which text an anchor is; without weights it does."""

    def trained(first_anchor: str, **options) -> torch.Tensor:
        table = sentences(16) | {"score": [0.0, *[1.0, 0.5] * 7, 2.0]}
        table["anchor"][0] = first_anchor
        model = tiny_model()
        loss = KINDS[kind](model, **options)
        trainer(tmp_path, model, loss, steps=3, dataset=Dataset.from_dict(table)).train()
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    weighted, plain = (
        error(trained("w1 w2", **options), trained("w3", **options))
        for options in ({"weights_from_labels": True}, {})
    )
    assert weighted < plain / 20


@both
def test_labels_that_are_no_weights(kind):
    model = tiny_model()
    loss, batch = KINDS[kind](model, weights_from_labels=True), features(model, 4)
    for labels, exception, words in (
        (None, ValueError, "weights_from_labels is True, and the dataset has no labels: expected"),
        (torch.arange(4), TypeError, "labels are torch.int64 and weights_from_labels is True"),
        (torch.ones(3), ValueError, r"image_weights has shape \(3,\): expected \(4,\)"),
        (-torch.ones(4), ValueError, "image_weights has -1.0 in row 0"),
    ):
        with pytest.raises(exception, match=words):
            loss([dict(c) for c in batch], labels)
    unused = KINDS[kind](tiny_model())
    assert unused(features(model, 4), torch.arange(4)) == unused(features(model, 4))


def test_settings_are_checked_and_on_the_model_card():
    for options, exception, words in (
        ({"positives": 2.0}, TypeError, "positives is a float: expected None, PositiveWeight"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing is -0.1: expected 0 to 1"),
    ):
        for make in KINDS.values():
            with pytest.raises(exception, match=words):
                make(tiny_model(), **options)
    assert not {"positives", "label_smoothing"} & set(SigLipLoss(tiny_model()).get_config_dict())
    config = SigLipLoss(tiny_model(), positives=PositiveWeight(2.0)).get_config_dict()
    assert config["positives"].startswith("PositiveWeight(pair=2.0")


def of_ranks(rank: int, world_size: int, model) -> None:
    torch.set_num_threads(1)
    settings, labels = SETTINGS[2], weights(12)
    batch = features(model, 12)
    whole, _ = eager(copy.deepcopy(model), batch, labels, settings)
    loss = SigLipLoss(model, gather_across_devices=True, **settings).double()
    rows = slice(6 * rank, 6 * rank + 6)
    value = loss([part(c, rows.start, rows.stop) for c in batch], labels[rows])
    value.backward()
    torch.distributed.all_reduce(value := value.detach())
    assert value.item() / world_size == pytest.approx(whole.item(), rel=1e-11)
    with pytest.raises((TypeError, ValueError), match=r"labels are torch.int64|on rank 1"):
        integers = labels[rows].long() if rank == 1 else labels[rows]
        loss([part(c, rows.start, rows.stop) for c in batch], integers)


def test_weights_on_ranks():
    returned(launch(of_ranks, 2, tiny_model().double()))
