"""patch_siglip on transformers' own models: what changes with the loss, and what does not."""

import copy
import math
import pickle

import pytest
import torch
from tiny_siglip import (
    MODELS,
    SiglipModel,
    assert_as_exact_as_own,
    cast,
    make_batch,
    make_model,
)
from torch import nn
from transformers_memory import peak_extra_bytes

from fused_siglip import PositiveTarget, PositiveWeight
from fused_siglip.integrations.transformers import patch_siglip, unpatch_siglip
from fused_siglip.testing import eager_siglip_loss
from support.tolerances import error

SIZE = 8
LOGITS = ("logits_per_image", "logits_per_text")


def assert_equal_outputs(actual, expected, without=()) -> None:
    """The same keys and the same bits, all the way down."""
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert list(actual) == [key for key in expected if key not in without]
        for key, value in actual.items():
            if key != "loss":
                assert_equal_outputs(value, expected[key])
    else:
        for a, e in zip(actual, expected, strict=True):
            assert_equal_outputs(a, e)


def loss_and_grads(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch, return_loss=True).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"loss": loss.detach()} | grads


# --- values ---


def test_loss_and_gradients_of_every_parameter(name, model, batch):
    own = loss_and_grads(model, batch)
    exact = loss_and_grads(copy.deepcopy(model).double(), cast(batch, torch.float64))
    actual = loss_and_grads(patch_siglip(model), batch)
    assert actual["loss"].shape == own["loss"].shape and actual["loss"].dtype == torch.float32
    assert_as_exact_as_own(actual, own, exact)
    double = patch_siglip(make_model(name).double())
    actual = loss_and_grads(double, cast(batch, torch.float64))
    assert actual["loss"].dtype == torch.float64
    assert_as_exact_as_own(actual, own, exact, torch.float64)


@pytest.mark.parametrize(
    "settings",
    [
        {"positives": PositiveWeight(3.0)},
        {"positives": PositiveTarget(0.9), "label_smoothing": 0.1},
        {"label_smoothing": 0.1},
    ],
    ids=str,
)
def test_targets_and_the_weight_of_positives(name, model, batch, settings):
    model, batch = model.double(), cast(batch, torch.float64)
    outputs = model(**batch)
    embeds = outputs.image_embeds, outputs.text_embeds
    eager_siglip_loss(*embeds, model.logit_scale.exp(), model.logit_bias, **settings).backward()
    exact = {n: p.grad.clone() for n, p in model.named_parameters()}
    patched = pickle.loads(pickle.dumps(patch_siglip(make_model(name).double(), **settings)))
    actual = loss_and_grads(patched, batch)
    for parameter, grad in exact.items():
        if not parameter.endswith("k_proj.bias"):  # whose gradient is 0
            assert error(actual[parameter], grad) < 1e-10, parameter


def test_loss_of_a_bfloat16_model(model, batch):
    exact = loss_and_grads(copy.deepcopy(model).double(), cast(batch, torch.float64))
    model, batch = model.bfloat16(), cast(batch, torch.bfloat16)
    own = loss_and_grads(model, batch)
    actual = loss_and_grads(patch_siglip(model), batch)
    assert actual["loss"].dtype == torch.float32  # and own is bfloat16
    assert_as_exact_as_own(actual, own, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scale_of_a_half_precision_model(model, batch, dtype):
    """exp in bfloat16 would be off by up to 0.4%, and the logits with it."""
    with torch.no_grad():
        model.logit_scale.fill_(4.78125), model.logit_bias.fill_(-16.5)  # both exact in bfloat16
    outputs = patch_siglip(model.to(dtype))(**cast(batch, dtype), return_loss=True)
    embeds = outputs.image_embeds.double(), outputs.text_embeds.double()
    exact = eager_siglip_loss(*embeds, math.exp(4.78125), -16.5)
    assert outputs.loss.item() == pytest.approx(exact.item(), rel=1e-5)


ARGUMENTS = {
    "plain": {},
    "attentions": {"output_attentions": True, "output_hidden_states": True},
    "position_ids": {"position_ids": torch.tensor([[5, 4, 3, 2, 1, 0]])},
    "tuple": {"return_dict": False},
    "return_dict": {"return_dict": True},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_other_outputs_keep_their_bits(model, batch, arguments):
    model.set_attn_implementation("eager")  # the one that returns attentions
    without = model(**batch, **arguments)
    own = model(**batch, **arguments, return_loss=True)
    patch_siglip(model)
    assert_equal_outputs(model(**batch, **arguments), without)
    actual = model(**batch, **arguments, return_loss=True)
    if isinstance(own, tuple):  # which leaves out what is None: here loss, then embeddings
        actual, own = actual[1:], own[3:]
    else:
        assert all(getattr(actual, key) is None for key in LOGITS)
    assert_equal_outputs(actual, own, without=LOGITS)
    if "output_attentions" in arguments and without.vision_model_output.attentions is None:
        pytest.skip("this release of transformers returns no attentions itself")
    if "output_attentions" in arguments:
        assert len(actual.vision_model_output.attentions) == 2


def test_larger_images_and_positional_arguments():
    model, batch = make_model("siglip"), make_batch("siglip", SIZE)
    images = torch.randn(SIZE, 3, 16, 16)
    positional = (batch["input_ids"], images, batch["attention_mask"], None, True, True)
    own = model(*positional)
    actual = patch_siglip(model)(*positional)
    assert_equal_outputs(actual, own, without=LOGITS)
    with pytest.raises(RuntimeError, match="size of tensor"):
        model(*positional[:-1])


def test_siglip2_sees_masks_and_shapes():
    model, batch = patch_siglip(make_model("siglip2")), make_batch("siglip2", SIZE)
    loss = model(**batch, return_loss=True).loss
    for change in (
        {"pixel_attention_mask": torch.ones_like(batch["pixel_attention_mask"])},
        {"spatial_shapes": batch["spatial_shapes"].flip(1)},
    ):
        assert model(**batch | change, return_loss=True).loss != loss


def test_frozen_tower_and_no_grad(model, batch):
    patch_siglip(model).vision_model.requires_grad_(False)
    model(**batch, return_loss=True).loss.backward()
    assert all(p.grad is None for p in model.vision_model.parameters())
    assert all(p.grad is not None for p in model.text_model.parameters())
    with torch.no_grad():
        assert not model(**batch, return_loss=True).loss.requires_grad


def test_gradient_checkpointing(model, batch):
    plain = loss_and_grads(patch_siglip(model), batch)
    model.gradient_checkpointing_enable()
    again = loss_and_grads(model, batch)
    assert all(torch.equal(again[name], value) for name, value in plain.items())


def test_compile(name, model, batch):
    """No graph break of ours: none in SigLIP, and in SigLIP 2 those of its own vision tower."""
    patch_siglip(model)
    expected = loss_and_grads(model, batch)
    fullgraph = name == "siglip"
    if not fullgraph:
        (reason,) = torch._dynamo.explain(model)(**batch, return_loss=True).break_reasons
        assert reason.user_stack[-1].name == "resize_positional_embeddings"
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    actual = {n.removeprefix("_orig_mod."): v for n, v in loss_and_grads(compiled, batch).items()}
    torch.testing.assert_close(actual, expected)
    assert compiled(**batch, return_loss=True).logits_per_image is None
    # patched and unpatched after it has run compiled
    assert unpatch_siglip(compiled)(**batch, return_loss=True).logits_per_image is not None
    assert patch_siglip(compiled)(**batch, return_loss=True).logits_per_image is None


# --- what stays as it was ---


def test_state_config_and_class_name(name, model, batch, tmp_path):
    state, config, text = copy.deepcopy(model.state_dict()), model.config.to_dict(), repr(model)
    expected = patch_siglip(model)(**batch, return_loss=True).loss
    assert model.state_dict().keys() == state.keys()
    assert model.config.to_dict() == config and repr(model) == text
    model_class = MODELS[name][0]
    assert isinstance(model, model_class) and type(model).__name__ == model_class.__name__
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path).train()
    assert loaded.config.architectures == [model_class.__name__]
    assert loaded(**batch, return_loss=True).logits_per_image is not None  # an instance of its own
    assert torch.equal(patch_siglip(loaded)(**batch, return_loss=True).loss, expected)


def test_class(name, patched_classes, batch, tmp_path):
    model = make_model(name)
    model.save_pretrained(tmp_path)
    for instance in (model, MODELS[name][0].from_pretrained(tmp_path)):
        assert instance(**batch, return_loss=True).logits_per_image is None
        assert instance(**batch).logits_per_image is not None
    unpatch_siglip(model)  # not of the instance
    assert model(**batch, return_loss=True).logits_per_image is None
    unpatch_siglip(patch_siglip(model))
    assert model(**batch, return_loss=True).logits_per_image is None


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_patched(model, batch, copier):
    expected = loss_and_grads(patch_siglip(model), batch)
    twin = copier(model)
    assert type(twin) is type(model)
    actual = loss_and_grads(twin, batch)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    unpatch_siglip(twin)
    assert twin(**batch, return_loss=True).logits_per_image is not None
    assert model(**batch, return_loss=True).logits_per_image is None


def test_patched_twice_is_patched_once(name, model, batch):
    model_class = MODELS[name][0]
    forward = vars(model_class)["forward"]
    for target in (model, model_class):
        for _ in range(2):
            assert patch_siglip(target) is target
        assert model(**batch, return_loss=True).logits_per_image is None
        assert unpatch_siglip(target) is target
        assert unpatch_siglip(target) is target
        assert model(**batch, return_loss=True).logits_per_image is not None
        assert type(model) is model_class and vars(model_class)["forward"] is forward


# --- wrappers and subclasses ---


class Inherits(SiglipModel):
    pass


class Overrides(SiglipModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_subclass_that_inherits():
    patch_siglip(Inherits)
    batch = make_batch("siglip", SIZE)
    model = Inherits(make_model().config)
    assert model(**batch, return_loss=True).logits_per_image is None
    assert make_model()(**batch, return_loss=True).logits_per_image is not None
    unpatch_siglip(Inherits)
    assert "forward" not in vars(Inherits)
    assert patch_siglip(model)(**batch, return_loss=True).logits_per_image is None


def test_subclass_with_its_own_forward(patched_classes):
    model = Overrides(make_model().config)
    for target in (Overrides, model):
        with pytest.raises(TypeError, match=r"Overrides has a forward of its own: .*SiglipModel"):
            patch_siglip(target)
    # what the message recommends
    assert model(**make_batch("siglip", SIZE), return_loss=True).logits_per_image is None


@pytest.mark.parametrize("wrap", [torch.compile, lambda m: nn.ModuleDict({"inner": m})])
def test_model_inside_a_module(model, batch, wrap):
    module = wrap(model)
    assert patch_siglip(module) is module
    assert model(**batch, return_loss=True).logits_per_image is None
    unpatch_siglip(module)
    assert model(**batch, return_loss=True).logits_per_image is not None


def test_accelerate(model, batch):
    """Patched first, the model stays patched however accelerate wraps and unwraps its forward."""
    accelerate = pytest.importorskip("accelerate")
    # a Trainer of an earlier test leaves its settings behind, process-wide
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(patch_siglip(model))
    for m in (prepared, pickle.loads(pickle.dumps(prepared)), copy.deepcopy(prepared)):
        assert m(**batch, return_loss=True).logits_per_image is None
    assert prepared(**batch, return_loss=True).image_embeds.dtype == torch.float32
    bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert bare(**batch, return_loss=True).logits_per_image is None
    prepared = accelerator.prepare(bare)
    assert unpatch_siglip(prepared)(**batch, return_loss=True).logits_per_image is not None
    with pytest.raises(TypeError, match=r"was replaced on the instance \(accelerate"):
        patch_siglip(prepared)


# --- memory ---


def test_peak_memory_of_a_step():
    own, fused = (peak_extra_bytes(loss, 4096) for loss in ("own", "fused"))
    assert own >= 5 * fused, f"own {own >> 20} MiB, fused {fused >> 20} MiB"
