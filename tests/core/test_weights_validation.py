"""Weights, shares, targets and smoothing that are refused, and in which words."""

import math

import pytest
import torch

from fused_siglip import Below, PositiveTarget, PositiveWeight, siglip_loss

NAN, INF = math.nan, math.inf
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(4)
BAD_CALLS = {
    "negative weight": ({"image_weights": torch.tensor([1, 2, -0.5, 0])}, ValueError, "image_weights has -0.5 in row 2: expected finite numbers of at least 0"),
    "NaN weight": ({"text_weights": torch.tensor([1, NAN, 1, 1])}, ValueError, "text_weights has nan in row 1: expected finite"),
    "infinite weight": ({"text_weights": torch.tensor([INF, 1, 1, 1])}, ValueError, "text_weights has inf in row 0: expected finite"),
    "weights of another number": ({"image_weights": torch.ones(3)}, ValueError, "image_weights has shape (3,): expected (4,), one weight a row"),
    "weights of rank 2": ({"text_weights": torch.ones(4, 1)}, ValueError, "text_weights has shape (4, 1): expected (4,)"),
    "one weight": ({"image_weights": torch.ones(())}, ValueError, "image_weights has shape (): expected (4,)"),
    "integer weights": ({"image_weights": torch.ones(4).long()}, TypeError, "image_weights has dtype torch.int64: expected a floating dtype"),
    "bool weights": ({"text_weights": torch.ones(4) > 0}, TypeError, "text_weights has dtype torch.bool: expected a floating dtype"),
    "complex weights": ({"text_weights": torch.ones(4) + 0j}, TypeError, "text_weights has dtype torch.complex64: expected a floating dtype"),
    "list of weights": ({"image_weights": [1.0] * 4}, TypeError, "image_weights is a list: expected None or a floating tensor of shape (batch,)"),
    "number as weights": ({"text_weights": 1.0}, TypeError, "text_weights is a float: expected None or a floating tensor"),
    "weights on another device": ({"image_weights": torch.ones(4, device="meta")}, ValueError, "image_weights is on the meta device"),
    "sparse weights": ({"image_weights": torch.ones(4).to_sparse()}, TypeError, "image_weights has layout torch.sparse_coo: expected a dense"),
    "number as positives": ({"positives": 0.5}, TypeError, "positives is a float: expected None, PositiveWeight(...) or PositiveTarget(...)"),
    "class as positives": ({"positives": PositiveWeight}, TypeError, "positives is a type: expected None, PositiveWeight(...)"),
    "aligned with M != N": ({"positives": PositiveWeight(aligned=1.0), "text_features": X[:3], "image_ids": IDS, "text_ids": IDS[:3]}, ValueError, "aligned=1.0, which is of pairs (i, i), and there are 4 images and 3 texts"),
    "smoothing below 0": ({"label_smoothing": -0.1}, ValueError, "label_smoothing is -0.1: expected 0 to 1"),
    "smoothing above 1": ({"label_smoothing": 1.01}, ValueError, "label_smoothing is 1.01: expected 0 to 1"),
    "NaN smoothing": ({"label_smoothing": NAN}, ValueError, "label_smoothing is nan: expected 0 to 1"),
    "smoothing in a tensor": ({"label_smoothing": torch.tensor(0.1)}, TypeError, "label_smoothing is a torch.Tensor: expected a number"),
    "bool smoothing": ({"label_smoothing": True}, TypeError, "label_smoothing is a bool: expected a number"),
    "no smoothing": ({"label_smoothing": None}, TypeError, "label_smoothing is a NoneType: expected a number"),
    "Below without positives": ({"negatives": Below(0.1), "negative_only": True}, ValueError, "negatives is a Below and negative_only is True: expected positives"),
    "reduction by another name": ({"reduction": "batchmean"}, ValueError, "reduction is 'batchmean': expected 'mean' or 'sum' or 'none'"),
}  # fmt: skip


@pytest.mark.parametrize("arguments,exception,words", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_call(arguments, exception, words):
    good = {"image_features": X, "text_features": X, "logit_scale": 10.0, "logit_bias": -10.0}
    for reduction in ("mean", "none"):
        with pytest.raises(exception) as caught:
            siglip_loss(**(good | {"reduction": reduction} | arguments))
        assert words in str(caught.value)


BAD_CHOICES = [
    (lambda: PositiveWeight(-0.1), ValueError, "pair is -0.1: expected a finite number of at least 0"),
    (lambda: PositiveWeight(per_image=NAN), ValueError, "per_image is nan: expected a finite"),
    (lambda: PositiveWeight(per_text=INF), ValueError, "per_text is inf: expected a finite"),
    (lambda: PositiveWeight("1"), TypeError, "pair is a str: expected a number"),
    (lambda: PositiveWeight(True), TypeError, "pair is a bool: expected a number"),
    (lambda: PositiveWeight(torch.tensor(1.0)), TypeError, "pair is a Tensor: expected a number"),
    (lambda: PositiveWeight(aligned=-1), ValueError, "aligned is -1: expected a finite"),
    (lambda: PositiveWeight(aligned="1"), TypeError, "aligned is a str: expected a number or None"),
    (lambda: PositiveWeight(per_image=None), TypeError, "per_image is a NoneType: expected a number"),
    (lambda: PositiveTarget(1.0, 0.1), ValueError, "add up to 1.1: expected at most 1"),
    (lambda: PositiveTarget(aligned=1.5), ValueError, "aligned is 1.5: expected a target of at most 1"),
    (lambda: PositiveTarget(-0.5, 1.0), ValueError, "pair is -0.5: expected a finite"),
    (lambda: Below(NAN), ValueError, "margin is nan: expected a finite number"),
    (lambda: Below(-INF), ValueError, "margin is -inf: expected a finite number"),
    (lambda: Below("0.1"), TypeError, "margin is a str: expected a number"),
    (lambda: Below(True), TypeError, "margin is a bool: expected a number"),
]  # fmt: skip


@pytest.mark.parametrize("make,exception,words", BAD_CHOICES)
def test_bad_choice(make, exception, words):
    with pytest.raises(exception) as caught:
        make()
    assert words in str(caught.value)


def test_shares_that_add_up_to_1_but_for_rounding():
    third = 1 / 3
    PositiveTarget(third, third, third)
    PositiveTarget(0.1 + 0.2, 0.3, 0.4)
