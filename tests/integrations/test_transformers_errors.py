"""Errors of patch_siglip, and calls that raise what they raised before."""

import copy

import pytest
from test_transformers import SIZE
from tiny_siglip import (
    Siglip2Model,
    SiglipModel,
)
from torch import nn

from fused_siglip.integrations.transformers import patch_siglip, unpatch_siglip


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (nn.Linear, "is the class Linear: expected SiglipModel or Siglip2Model"),
        (nn.Linear(2, 2), "is a Linear that holds 0 SigLIP models"),
        ("google/siglip-base-patch16-224", "is a str: expected SiglipModel or Siglip2Model"),
        (None, "is a NoneType"),
    ],
    ids=["class", "module", "str", "None"],
)
def test_wrong_object(target, message):
    for function in (patch_siglip, unpatch_siglip):
        with pytest.raises(TypeError, match=message):
            function(target)


def test_two_models_in_one_module(model):
    with pytest.raises(TypeError, match="holds 2 SigLIP models"):
        patch_siglip(nn.ModuleList([model, copy.deepcopy(model)]))


def test_options(model):
    with pytest.raises(TypeError, match="group is 'all': expected None, 'world'"):
        patch_siglip(model, group="all")
    with pytest.raises(ValueError, match="dist_impl is 'rings': expected None, 'ring'"):
        patch_siglip(model, dist_impl="rings")
    with pytest.raises(TypeError, match=r"positives is a float: expected None, PositiveWeight"):
        patch_siglip(model, positives=2.0)
    with pytest.raises(ValueError, match="label_smoothing is 2: expected 0 to 1"):
        patch_siglip(model, label_smoothing=2)
    assert type(model) in (SiglipModel, Siglip2Model)


def test_argument_that_is_not_known(monkeypatch):
    def forward(self, input_ids=None, pixel_values=None, class_ids=None, return_loss=None):
        raise AssertionError

    monkeypatch.setattr(SiglipModel, "forward", forward)
    with pytest.raises(TypeError, match="forward of SiglipModel takes class_ids"):
        patch_siglip(SiglipModel)


def outcome(model, arguments: dict) -> tuple | None:
    """What a call raises; None if it succeeds."""
    try:
        model(**arguments, return_loss=True)
    except Exception as error:
        return type(error), str(error)


def test_bad_calls_raise_what_they_raised(model, batch):
    calls = [{k: v for k, v in batch.items() if k != missing} for missing in batch]
    calls += [batch | {"no_such_argument": 1}, batch | {"output_attentions": "no"}]
    patched = patch_siglip(copy.deepcopy(model))
    refused = 0
    for arguments in calls:
        own, actual = (outcome(m, arguments) for m in (model, patched))
        assert actual == own
        refused += own is not None
    assert refused >= 2  # input_ids and pixel_values
    for positional in ((batch["input_ids"],), (None,) * 20):
        for m in (model, patched):
            with pytest.raises(TypeError, match=r"multiple values|positional arguments"):
                m(*positional, **batch, return_loss=True)


def test_different_numbers_of_images_and_texts(model, batch):
    batch["input_ids"], batch["attention_mask"] = (batch[k][1:] for k in list(batch)[:2])
    patch_siglip(model)
    assert model(**batch).logits_per_image.shape == (SIZE, SIZE - 1)
    with pytest.raises(ValueError, match="text_features has 7 rows and image_features 8"):
        model(**batch, return_loss=True)
