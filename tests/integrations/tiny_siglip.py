"""Tiny SigLIP models of transformers, and batches for them."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision_on_cpu import define_schemas

define_schemas()  # here too: processes that a test launches import this and no conftest

from transformers import (
    PreTrainedModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

from fused_siglip.testing.rounding import UNIT_ROUNDOFF
from support.tolerances import error

MODELS = {"siglip": (SiglipModel, SiglipConfig), "siglip2": (Siglip2Model, Siglip2Config)}
TOKENS, VOCABULARY = 6, 99
PATCHES, PATCH = 4, 4  # of an image
LOGIT_SCALE, LOGIT_BIAS = 10.0, -2.0  # negatives count from the start


def make_model(name: str = "siglip", seed: int = 0, **config) -> PreTrainedModel:
    """An untrained model in train mode. config: of both towers."""
    common = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    } | config
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": TOKENS, "pad_token_id": 0}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "projection_size": common["hidden_size"]}
    vision = {"patch_size": PATCH}
    if name == "siglip":
        vision["image_size"] = 2 * PATCH
    else:
        vision["num_patches"] = PATCHES
    model_class, config_class = MODELS[name]
    torch.manual_seed(seed)
    model = model_class(config_class(text_config=common | text, vision_config=common | vision))
    with torch.no_grad():
        model.logit_scale.fill_(LOGIT_SCALE).log_()
        model.logit_bias.fill_(LOGIT_BIAS)
    return model.train()


def make_batch(name: str, size: int, seed: int = 0) -> dict[str, Tensor]:
    """``size`` random pairs, with text padding and, for SigLIP 2, images of two shapes."""
    generator = torch.Generator().manual_seed(seed)
    odd = torch.arange(size) % 2 == 1
    attention_mask = torch.ones(size, TOKENS, dtype=torch.long)
    attention_mask[odd, TOKENS - 2 :] = 0
    batch = {
        "input_ids": torch.randint(3, VOCABULARY, (size, TOKENS), generator=generator),
        "attention_mask": attention_mask,
    }
    if name == "siglip":
        batch["pixel_values"] = torch.randn(size, 3, 2 * PATCH, 2 * PATCH, generator=generator)
        return batch
    batch["pixel_values"] = torch.randn(size, PATCHES, 3 * PATCH**2, generator=generator)
    batch["pixel_attention_mask"] = torch.ones(size, PATCHES, dtype=torch.long)
    batch["pixel_attention_mask"][odd, 3] = 0
    batch["spatial_shapes"] = torch.where(odd[:, None], torch.tensor([1, 3]), torch.tensor([2, 2]))
    return batch


def cast(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return batch | {"pixel_values": batch["pixel_values"].to(dtype)}


def errors(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """By name, the largest deviation relative to the largest exact element.

    Not of the key projections' biases: softmax does not see them, their exact gradient is 0.
    """
    return {n: error(actual[n], x) for n, x in exact.items() if not n.endswith("k_proj.bias")}


def assert_as_exact_as_own(
    actual: dict[str, Tensor],
    own: dict[str, Tensor],
    exact: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Within twice the worst error of the model's own loss against float64: both draw roundings.

    Never less than one rounding of the largest logit, since an error can be small by luck. dtype:
    float64 where actual is; own is float32 also then, and what it allows is scaled.
    """
    actual_errors, own_errors = errors(actual, exact), errors(own, exact)
    rounding = (LOGIT_SCALE - LOGIT_BIAS) * UNIT_ROUNDOFF[torch.float32]
    allowed = max(2 * max(own_errors.values()), rounding)
    allowed *= UNIT_ROUNDOFF[dtype] / UNIT_ROUNDOFF[torch.float32]
    worst = max(actual_errors, key=actual_errors.get)
    assert actual_errors[worst] <= allowed, (
        f"{worst}: {actual_errors[worst]:.1e}, allowed {allowed:.1e}"
    )
