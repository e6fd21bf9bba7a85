"""Losses of sentence-transformers: several of one model, in others, in half precision, on ranks."""

import copy
import functools
import json
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from sentence_models import EagerSigLipLoss, features, part, tiny_model, trainer
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses import column_merging_disabled
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    Matryoshka2dLoss,
    MatryoshkaLoss,
)
from torch import nn

from fused_siglip.integrations.sentence_transformers import (
    SCALE_AND_BIAS_FILE,
    CachedSigLipLoss,
    SigLipLoss,
)
from fused_siglip.testing import eager_siglip_loss
from support.processes import launch, returned
from support.tolerances import error

KINDS: dict[str, Callable] = {
    "plain": SigLipLoss,
    "cached": lambda m, *a, **o: CachedSigLipLoss(m, *a, mini_batch_size=3, **o),
}
both = pytest.mark.parametrize("kind", list(KINDS))
ROUNDING = 1e-12

torch.set_num_threads(1)


def normalized(model, columns) -> list[torch.Tensor]:
    with torch.no_grad():
        embeddings = [model(dict(column))["sentence_embedding"].double() for column in columns]
    return [nn.functional.normalize(embedding, dim=-1) for embedding in embeddings]


def exact(model, columns, log_scale: float, bias: float) -> float:
    anchors, *texts = normalized(model, columns)
    ids = torch.arange(len(torch.cat(texts)))
    labels = {"image_ids": ids[: len(anchors)], "text_ids": ids}
    return eager_siglip_loss(anchors, torch.cat(texts), math.exp(log_scale), bias, **labels).item()


# --- several losses of one model ---


@both
def test_losses_of_one_start_share(kind):
    model = tiny_model()
    first = KINDS[kind](model, 2.0, -5.0)
    with torch.no_grad():
        model.logit_scale_and_bias.add_(0.25)  # trained meanwhile
    second = KINDS[kind](model, 2.0, -5.0)
    columns = features(model, 6)
    for loss in (first, second):
        value = loss([dict(c) for c in columns]).item()
        assert value == pytest.approx(exact(model, columns, 2.25, -4.75), rel=1e-5)
    model.reset_parameters()
    assert model.logit_scale_and_bias.tolist() == [2.0, -5.0]


@both
@pytest.mark.parametrize("start", [{}, {"init_logit_scale": 1.0, "init_logit_bias": -5.0}])
def test_losses_of_other_starts_are_refused(kind, start):
    model = tiny_model()
    KINDS[kind](model, 2.0, -5.0)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match=r"which started at \(2.0, -5.0\).*or name= for"):
            KINDS[kind](other, **start)
        assert other.logit_scale_and_bias.tolist() == [2.0, -5.0]


@both
def test_losses_of_other_names_have_their_own(kind, tmp_path):
    model = tiny_model()
    starts = {None: (2.0, -5.0), "pairs": (1.0, -2.0), "images": (0.5, -1.0)}
    losses = {name: KINDS[kind](model, *start, name=name) for name, start in starts.items()}
    columns = features(model, 6)
    for name, loss in losses.items():
        model.zero_grad()
        value = loss([dict(c) for c in columns])
        value.backward()
        assert value.item() == pytest.approx(exact(model, columns, *starts[name]), rel=1e-5)
        own = "logit_scale_and_bias" + ("" if name is None else f"_{name}")
        moved = {n for n, p in model.named_parameters() if "logit" in n and p.grad is not None}
        assert moved == {own} and loss.get_config_dict().get("name") == name
    model.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / SCALE_AND_BIAS_FILE).read_text())
    assert saved["pairs"] == {"logit_scale": 1.0, "logit_bias": -2.0}
    assert saved["logit_scale"] == 2.0
    again = type(model)(str(tmp_path), device="cpu")  # as the trainer resumes
    again.load_state_dict(model.state_dict())
    assert not hasattr(SentenceTransformer(str(tmp_path), device="cpu"), "logit_scale_and_bias")


@pytest.mark.parametrize("name", ["", "two words", "logit_scale", "a.b"])
def test_wrong_names(name):
    with pytest.raises(ValueError, match="expected letters, digits and underscores"):
        SigLipLoss(tiny_model(), name=name)


# --- half precision, deferred initialisation ---


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scale_and_bias_of_a_half_precision_model(kind, dtype):
    model = tiny_model()
    loss = KINDS[kind](model, 4.78125, -16.5)
    model.to(dtype)
    assert model.dtype == dtype and model.logit_scale_and_bias.dtype == torch.float32
    columns = features(model, 6)
    value = loss([dict(c) for c in columns])
    rounded = [n.item() for n in (torch.tensor(4.78125), torch.tensor(-16.5))]
    if kind == "plain":  # cached embeds in other batches, which rounds otherwise
        assert value.item() == pytest.approx(exact(model, columns, *rounded), rel=1e-5)
    optimizer = torch.optim.AdamW([model.logit_scale_and_bias], lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss([dict(c) for c in columns]).backward()
        optimizer.step()
    moved = model.logit_scale_and_bias.detach() - torch.tensor([4.78125, -16.5])
    assert moved.abs().min() > 2e-3


def test_a_scale_that_something_else_rounded():
    model = tiny_model()
    loss = SigLipLoss(model, 4.78125, -16.5)
    model.logit_scale_and_bias.data = model.logit_scale_and_bias.data.bfloat16()
    columns = features(model, 6)
    value = loss([dict(c) for c in columns]).item()
    assert value == pytest.approx(exact(model, columns, 4.78125, -16.5), rel=1e-5)


def test_from_the_meta_device():
    for _ in range(5):
        model = tiny_model().to("meta")
        SigLipLoss(model, 1.25, -4.5)
        SigLipLoss(model, 0.75, -1.5, name="other")
        model.bfloat16().to_empty(device="cpu")
        assert model.logit_scale_and_bias.tolist() == [1.25, -4.5]
        assert model.logit_scale_and_bias_other.tolist() == [0.75, -1.5]
        model.logit_scale_and_bias.data.fill_(9.0)
        model.to_empty(device="cpu", recurse=False)
        model.reset_parameters()  # as FSDP1 does
        assert model.logit_scale_and_bias.tolist() == [1.25, -4.5]


# --- how columns are embedded ---


def passes(model, call) -> list[int]:
    """Rows of the encoder's forward passes in a call."""
    rows = []
    hook = model[0].register_forward_hook(
        lambda module, args, output: rows.append(len(args[0]["input_ids"]))
    )
    call()
    hook.remove()
    return rows


def test_further_columns_share_a_pass_as_in_the_library():
    model, peer = tiny_model(), tiny_model()
    loss, separate = SigLipLoss(model).double(), SigLipLoss(peer).double()
    columns = features(model, 2, columns=4)
    assert passes(model, lambda: loss([dict(c) for c in columns]).backward()) == [2, 6]
    with column_merging_disabled():
        assert passes(peer, lambda: separate([dict(c) for c in columns]).backward()) == [2] * 4
    for (name, p), (_, q) in zip(model.named_parameters(), peer.named_parameters(), strict=True):
        if q.grad is not None and not name.endswith("key.bias"):  # whose gradient is 0
            assert error(p.grad, q.grad) < 1e-10, name
    assert passes(model, lambda: loss(features(model, 2))) == [2, 2]
    uneven = [columns[0], columns[1], part(columns[2], 0, 1)]
    assert passes(model, lambda: loss(uneven)) == [2, 2, 1]


# --- inside the library's wrappers ---


class EagerOfAll(EagerSigLipLoss):
    """Of all columns, so that wrappers' forward passes are the library's own."""


def gradients(model, loss, columns) -> list[torch.Tensor]:
    model.zero_grad()
    value = loss([dict(c) for c in columns], None)
    value.backward()
    grads = [p.grad for n, p in model.named_parameters() if p.grad is not None and "logit" not in n]
    return [value.detach(), torch.cat([g.flatten() for g in grads])]


@both
@pytest.mark.parametrize("dims", [[32, 8], [32, 16, 2]])
def test_matryoshka_of_three_columns(kind, dims):
    model, peer = tiny_model().double(), tiny_model().double()
    ours = MatryoshkaLoss(model, KINDS[kind](model).double(), dims)
    columns = features(model, 7, columns=3)
    value, grad = gradients(model, ours, columns)

    starts = (math.log(10), -10.0)  # in float32
    t, b = (torch.tensor(v).double().requires_grad_() for v in starts)
    embeddings = [peer(dict(c))["sentence_embedding"] for c in columns]
    total, ids = 0.0, torch.arange(14)
    for dim in dims:
        anchors, *texts = (nn.functional.normalize(e[:, :dim], dim=-1) for e in embeddings)
        labels = {"image_ids": ids[:7], "text_ids": ids}
        total = total + eager_siglip_loss(anchors, torch.cat(texts), t.exp(), b, **labels)
    total.backward()
    grads = [p.grad for p in peer.parameters() if p.grad is not None]
    assert error(value, total.detach()) < ROUNDING
    assert error(grad, torch.cat([g.flatten() for g in grads])) < 100 * ROUNDING
    assert error(model.logit_scale_and_bias.grad, torch.stack([t.grad, b.grad])) < ROUNDING


def test_a_matryoshka_dimension_of_1():
    model = tiny_model()
    loss = MatryoshkaLoss(model, CachedSigLipLoss(model), [32, 1])
    with pytest.raises(ValueError, match="with a dimension of 1: expected dimensions of 2 or more"):
        loss(features(model, 4), None)


@pytest.mark.parametrize("wrapper", [AdaptiveLayerLoss, functools.partial(MatryoshkaLoss)])
def test_cached_in_the_trainer_inside_a_wrapper(wrapper, tmp_path):
    model = tiny_model()
    dims = {"matryoshka_dims": [32, 8]} if wrapper is not AdaptiveLayerLoss else {}
    loss = CachedSigLipLoss(model, mini_batch_size=5)
    if wrapper is AdaptiveLayerLoss:
        with pytest.warns(UserWarning, match="not compatible"):
            loss = wrapper(model, loss)
        with pytest.raises(ValueError, match="inside AdaptiveLayerLoss: expected SigLipLoss"):
            trainer(tmp_path, model, loss, steps=1).train()
    else:
        trainer(tmp_path, model, wrapper(model, loss, **dims), steps=2).train()
        moved = model.logit_scale_and_bias.detach() - torch.tensor([math.log(10), -10.0])
        assert moved.abs().min() > 1e-5


def test_adaptive_layers():
    model, peer = tiny_model().double(), tiny_model().double()
    values = []
    for each, loss in ((model, SigLipLoss(model).double()), (peer, EagerOfAll(peer))):
        wrapped = AdaptiveLayerLoss(each, loss, n_layers_per_step=-1)
        values.append(gradients(each, wrapped, features(each, 6)))
    for a, e in zip(*values, strict=True):
        assert error(a, e) < 1e-6  # t' and b start in float32
    with pytest.warns(UserWarning, match="not compatible"):
        both_ways = Matryoshka2dLoss(model, CachedSigLipLoss(model), [32, 8])
    with pytest.raises(ValueError, match="inside AdaptiveLayerLoss: expected SigLipLoss"):
        both_ways(features(model, 6), None)


# --- ranks with different columns ---


def different_columns(rank: int, world_size: int, counts: list[int], model) -> None:
    torch.set_num_threads(1)
    sizes = [4, 3, 5][:world_size]
    batches = [
        [part(c, 6 * r, 6 * r + sizes[r]) for c in features(model, 18, counts[r])]
        for r in range(world_size)
    ]
    everything = [normalized(model, batch) for batch in batches]
    anchors, texts = everything[rank][0], torch.cat([t for e in everything for t in e[1:]])
    first = sum(len(t) for e in everything[:rank] for t in e[1:])
    labels = {"image_ids": first + torch.arange(len(anchors)), "text_ids": torch.arange(len(texts))}
    t = math.exp(torch.tensor(math.log(10)).item())
    share = eager_siglip_loss(anchors, texts, t, -10.0, reduction="sum", **labels).item()
    share *= world_size / sum(sizes)
    for make in KINDS.values():
        loss = make(copy.deepcopy(model), gather_across_devices=True).double()
        value = loss([dict(c) for c in batches[rank]])
        value.backward()
        assert value.item() == pytest.approx(share, rel=1e-9)
    short = [dict(c) for c in batches[rank]]
    if rank == 1:
        short[1] = part(short[1], 0, 2)
    with pytest.raises(ValueError, match=r"3 anchors have 2 positives|bad arguments on rank 1"):
        SigLipLoss(model, gather_across_devices=True)(short)


@pytest.mark.parametrize("counts", [[2, 3], [4, 2, 3], [2, 2]])
def test_ranks_with_different_columns(counts):
    returned(launch(different_columns, len(counts), counts, tiny_model().double()))
