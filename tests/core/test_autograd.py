"""The loss inside a training step: autograd, autocast, scalers, accumulation, torch.compile."""

import pytest
import torch

from fused_siglip import siglip_loss
from fused_siglip.spec import SCHEMA, GradMask, LossSpec, NegativeChoice, PositiveChoice
from fused_siglip.testing import eager_siglip_loss
from support.inputs import loss_and_grads, make_inputs, one_tile
from support.tolerances import assert_as_exact_as_eager, error, oracle


def features_of(model, images, texts):
    normalize = torch.nn.functional.normalize
    return normalize(model["image"](images)), normalize(model["text"](texts))


def small_model(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.ModuleDict({k: torch.nn.Linear(12, 8) for k in ("image", "text")})
    model.scale = torch.nn.Parameter(torch.tensor(10.0).log())
    model.bias = torch.nn.Parameter(torch.tensor([-10.0]))
    return model


def step(model, loss_function, images, texts):
    x, y = features_of(model, images, texts)
    return loss_function(x, y, model.scale.exp(), model.bias)


def grads(model):
    return [p.grad.clone() for p in model.parameters()]


def data(n=48, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 12, generator=generator), torch.randn(n, 12, generator=generator)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_scalars_get_gradients_of_their_own_shape_and_dtype(shape, dtype):
    inputs = make_inputs(20, 20, 8)
    inputs.logit_scale = torch.full(shape, 10.0, dtype=dtype, requires_grad=True)
    inputs.logit_bias = torch.full(shape, -10.0, dtype=dtype, requires_grad=True)
    loss_and_grads(siglip_loss, inputs)
    for scalar in (inputs.logit_scale, inputs.logit_bias):
        assert scalar.grad.shape == shape
        assert scalar.grad.dtype == dtype


def test_numbers_and_a_missing_bias():
    inputs = make_inputs(20, 20, 8, b=0.0)
    x, y = inputs.image_features, inputs.text_features
    expected = siglip_loss(x, y, inputs.logit_scale, inputs.logit_bias)
    assert torch.equal(siglip_loss(x, y, 10), expected)
    assert torch.equal(siglip_loss(x, y, 10.0, None), expected)


def test_upstream_gradient_scales_all_gradients():
    inputs = make_inputs(64, 64, 8)
    plain = loss_and_grads(siglip_loss, inputs)
    scaled = loss_and_grads(lambda *a, **k: siglip_loss(*a, **k) * -3, inputs)
    for p, s in zip(plain[1:], scaled[1:], strict=True):
        torch.testing.assert_close(s, -3 * p)


def test_retain_graph_gives_the_same_gradients_again():
    inputs = make_inputs(64, 64, 8)
    loss = siglip_loss(*inputs.tensors()) * 0.37
    first = torch.autograd.grad(loss, inputs.tensors(), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, inputs.tensors(), retain_graph=True)
    last = torch.autograd.grad(loss, inputs.tensors())
    for values in zip(kept, first, second, last, strict=True):
        assert all(torch.equal(values[0], v) for v in values[1:])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs.tensors())


def test_a_backward_through_part_of_the_inputs_then_the_rest():
    inputs = make_inputs(64, 64, 8)
    expected = loss_and_grads(siglip_loss, inputs)[1:]
    loss = siglip_loss(*inputs.tensors())
    for k, tensor in enumerate(inputs.tensors()):
        (grad,) = torch.autograd.grad(loss, tensor, retain_graph=k < 3)
        assert torch.equal(grad, expected[k])


def test_gradient_accumulation_over_two_losses():
    model = small_model()
    for seed in (1, 2):
        (step(model, siglip_loss, *data(seed=seed)) / 2).backward()
    accumulated = grads(model)
    model.zero_grad()
    total = sum(step(model, eager_siglip_loss, *data(seed=seed)) for seed in (1, 2)) / 2
    total.backward()
    for a, e in zip(accumulated, grads(model), strict=True):
        torch.testing.assert_close(a, e)


def test_loss_may_be_changed_in_place_as_open_clip_does():
    inputs = make_inputs(30, 30, 8)
    expected = loss_and_grads(siglip_loss, inputs)[1:]
    for reduction, factor in (("mean", 1), ("sum", 30)):
        loss = siglip_loss(*inputs.tensors(), reduction=reduction)
        loss += 1.0
        for g, e in zip(torch.autograd.grad(loss, inputs.tensors()), expected, strict=True):
            torch.testing.assert_close(g, e * factor)


def test_double_backward_raises_instead_of_passing_for_a_constant():
    inputs = make_inputs(20, 20, 8)
    for tensor in inputs.tensors():
        loss = siglip_loss(*inputs.tensors())
        (grad,) = torch.autograd.grad(loss, tensor, create_graph=True)
        with pytest.raises(RuntimeError, match="siglip_loss does not support double backward"):
            grad.pow(2).sum().backward()


def test_changing_the_scale_between_forward_and_backward_is_refused():
    inputs = make_inputs(20, 20, 8)
    loss = siglip_loss(*inputs.tensors())
    with torch.no_grad():
        inputs.logit_scale += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_grad(backend, device, context):
    inputs = make_inputs(150, 150, 16, device=device)
    expected = siglip_loss(*inputs.tensors(), backend=backend)
    with context():
        loss = siglip_loss(*inputs.tensors(), backend=backend)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_autocast_casts_as_matmul_does(backend, device, dtype, mixed):
    """As exact as eager in the low dtype, with gradients in the inputs' own dtypes."""
    inputs = make_inputs(150, 150, 48, device=device)
    if mixed:
        inputs.text_features = inputs.text_features.detach().to(dtype).requires_grad_()
    with torch.autocast(device, dtype):
        actual = loss_and_grads(siglip_loss, inputs, backend=backend)
    assert actual[0].dtype == torch.float32
    assert [g.dtype for g in actual[1:3]] == [torch.float32, dtype if mixed else torch.float32]
    rounded = make_inputs(150, 150, 48, dtype, device=device)
    for a, x in zip(actual, oracle(rounded), strict=True):
        assert error(a, x) <= 2 * torch.finfo(dtype).eps


def test_autocast_leaves_float64_alone():
    inputs = make_inputs(40, 40, 8, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss_and_grads(siglip_loss, inputs)
    assert_as_exact_as_eager(actual, inputs)


def test_autocast_does_not_reach_the_products_inside():
    inputs = make_inputs(200, 200, 32, torch.bfloat16)
    plain = loss_and_grads(siglip_loss, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = loss_and_grads(siglip_loss, inputs)
    assert all(torch.equal(c, p) for c, p in zip(cast, plain, strict=True))


def test_grad_scaler_in_fp16():
    """With a scaler, fp16 gradients far below fp16's smallest number arrive exactly scaled."""
    inputs = make_inputs(64, 64, 16, torch.float16)
    exact = oracle(inputs, reduction="sum")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for divisor in (1.0, 1e6):  # at 1e-6 the unscaled gradients would vanish in fp16
        inputs.image_features.grad = None
        loss = siglip_loss(*inputs.tensors(), reduction="sum") / divisor
        scaler.scale(loss * 2.0**-10).backward()
        grad = inputs.image_features.grad.double() / 2.0**6 * divisor
        assert error(grad, exact[1]) <= 4 * torch.finfo(torch.float16).eps


def test_default_dtype_and_device_of_the_caller_do_not_matter():
    inputs = make_inputs(64, 64, 8)
    expected = loss_and_grads(siglip_loss, inputs)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            actual = loss_and_grads(siglip_loss, inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_trains_like_eager():
    trajectories = []
    for loss_function in (siglip_loss, eager_siglip_loss):
        model = small_model().double()  # so that nothing but the loss can tell them apart
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in range(20):
            optimizer.zero_grad()
            images, texts = data(seed=seed)
            step(model, loss_function, images.double(), texts.double()).backward()
            optimizer.step()
        trajectories.append([p.detach() for p in model.parameters()])
    for fused, eager in zip(*trajectories, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_step_has_no_graph_break(dynamic):
    model = small_model()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (48, 32, 7):
        model.zero_grad()
        expected = step(model, siglip_loss, *data(n))
        expected.backward()
        expected_grads = grads(model)
        model.zero_grad()
        loss = compiled(model, siglip_loss, *data(n))
        loss.backward()
        torch.testing.assert_close(loss, expected)
        for g, e in zip(grads(model), expected_grads, strict=True):
            torch.testing.assert_close(g, e)


def test_compiled_under_autocast_with_ids_and_frozen_tower():
    inputs = make_inputs(40, 30, 8, ids=True, requires_grad=(False, True, True, True))

    def loss(*tensors):
        with torch.autocast("cpu", torch.bfloat16):
            return siglip_loss(*tensors, **inputs.ids)

    expected = loss_and_grads(lambda *tensors, **_: loss(*tensors), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = loss_and_grads(lambda *tensors, **_: compiled(*tensors), inputs)
    assert actual[1] is None
    for a, e in zip(actual, expected, strict=True):
        assert a is e or torch.equal(a, e)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_inductor_compiles_the_step():
    model, compiled = small_model(), torch.compile(step, fullgraph=True)
    loss = compiled(model, siglip_loss, *data())
    loss.backward()
    compiled_grads = grads(model)
    model.zero_grad()
    step(model, siglip_loss, *data()).backward()
    for c, e in zip(compiled_grads, grads(model), strict=True):
        torch.testing.assert_close(c, e)


OPTIONS = LossSpec(
    GradMask(True, False, True), False, NegativeChoice("random", 0.25, 9),
    PositiveChoice("weight", 0.5, 0.25, 0.25, 1.0), 0.1, "sum", "torch", 1 << 20, None, None, None,
)  # fmt: skip


@pytest.mark.parametrize("negatives", [None, "random", "hardest"])
@pytest.mark.parametrize("ids", [False, True])
def test_operator_is_registered_soundly(ids, negatives):
    inputs = make_inputs(20, 20, 8, ids=ids, requires_grad=(False,) * 4)
    inputs.image_features = inputs.image_features.T.contiguous().T
    image_ids, text_ids = inputs.ids.get("image_ids"), inputs.ids.get("text_ids")
    arguments = (
        *inputs.tensors(),
        image_ids,
        text_ids,
        torch.linspace(0, 1, 20) if ids else None,
        None,
        *OPTIONS._replace(
            grads=GradMask(True, ids, True), negatives=NegativeChoice(negatives, 0.5, 7)
        ).to_op(),
    )
    torch.library.opcheck(torch.ops.fused_siglip.loss_and_grads.default, arguments)
    torch.library.opcheck(torch.ops.fused_siglip.image_losses.default, arguments)


def test_a_spec_and_its_flat_form_say_the_same():
    """In the order of the schema, whose names are those of from_op."""
    names = [argument.split("=")[0].split()[-1] for argument in SCHEMA.split(", ")]
    spec = OPTIONS._replace(dtype=torch.bfloat16)
    flat = spec.to_op()
    assert LossSpec.from_op(*flat) == spec
    by_name = dict(zip(names, flat, strict=True))
    assert by_name["need_text_grad"] is False and by_name["amount"] == 0.25
    assert by_name["pair"] == 0.5 and by_name["label_smoothing"] == 0.1
    assert by_name["reduction"] == "sum" and by_name["dtype"] == torch.bfloat16
    assert LossSpec.from_op(*flat[:-1]) == spec._replace(dtype=None)


def test_threads_get_the_same_bits():
    from concurrent.futures import ThreadPoolExecutor

    def run(seed):
        inputs = make_inputs(200, 200, 16, seed=seed)
        return loss_and_grads(siglip_loss, inputs, workspace_bytes=one_tile("torch", torch.float32))

    expected = [run(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(run, range(8)))
    for a, e in zip(actual, expected, strict=True):
        assert all(torch.equal(v, w) for v, w in zip(a, e, strict=True))
