"""Under torch's transforms the loss is right, or refused with a message (support/transforms.py)."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fused_siglip import Hardest, Random, siglip_loss
from fused_siglip.testing import eager_siglip_loss
from support.inputs import make_inputs
from support.refused_transforms import REFUSED
from support.tolerances import error
from support.transforms import EXACT, B, T, X, Y, same

pytestmark = [  # of torch itself
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    # the eager loss under vmap
    pytest.mark.filterwarnings("ignore:There is a performance drop .* for aten..fill_diagonal_"),
]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "transforms.md"

# In torch.compile: the rows that are exact, and by backend those that are refused. Behind
# AOTAutograd second derivatives through a compiled function are torch's to refuse.
COMPILED = [row for row in EXACT if "export" not in row and "make_fx" not in row]
FUNC = [row for row in REFUSED if row.startswith("`torch.func.") and "linearize" not in row]
COMPILED_REFUSED = {"eager": ["second derivatives", *FUNC], "aot_eager": FUNC}
# what the backends cannot carry, whatever the loss
NOT_COMPILED = {("aot_eager", "factor"), ("aot_eager", "allow_mutation")}

exact_forms = pytest.mark.parametrize(
    "form", [pytest.param(f, id=n) for forms in EXACT.values() for n, f in forms.items()]
)


def assert_exact(form, wrap=same):
    expected = torch.utils._pytree.tree_leaves(form(eager_siglip_loss, same))
    actual = torch.utils._pytree.tree_leaves(form(siglip_loss, wrap))
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert error(a, e) <= 1e-13


@exact_forms
def test_exact(form):
    assert_exact(form)


@pytest.mark.parametrize(
    "words,form",
    [
        pytest.param(words, form, id=name)
        for words, forms in REFUSED.values()
        for name, form in forms.items()
    ],
)
def test_refused(words, form):
    with pytest.raises(RuntimeError) as caught:
        form(siglip_loss, same)
    assert str(caught.value).startswith(words)
    assert "eager_siglip_loss" in str(caught.value)  # what to use instead


def compiler(backend):
    torch._dynamo.reset()
    return lambda function: torch.compile(function, backend=backend)


@pytest.mark.covering(1)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "name,form", [pytest.param(n, f, id=n) for row in COMPILED for n, f in EXACT[row].items()]
)
def test_exact_when_compiled(name, form, backend):
    if (backend, name) in NOT_COMPILED:
        pytest.skip("torch does not compile this with any loss")
    assert_exact(form, compiler(backend))


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("name", ["backward", "one tensor twice", "grad", "vmap of grad"])
def test_exact_with_inductor(name):
    (form,) = (forms[name] for forms in EXACT.values() if name in forms)
    assert_exact(form, compiler("inductor"))


@pytest.mark.parametrize(
    "backend,words,form",
    [
        pytest.param(backend, REFUSED[row][0], form, id=f"{backend}-{name}")
        for backend, rows in COMPILED_REFUSED.items()
        for row in rows
        for name, form in REFUSED[row][1].items()
        if not name.endswith((" y", " b"))  # as x and t
    ],
)
def test_refused_when_compiled(backend, words, form):
    with pytest.raises(RuntimeError, match=words):
        form(siglip_loss, compiler(backend))


def test_what_torch_compile_refuses_itself():
    form = REFUSED["second derivatives"][1]["penalty in x"]
    for loss in (siglip_loss, eager_siglip_loss):
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            form(loss, compiler("aot_eager"))


def test_one_tensor_twice_in_one_graph():
    ids = torch.tensor([0, 1, 1, -1, 2, 3])
    x = X.clone().requires_grad_()
    for arguments, options in (
        ((x, x, T, B), {}),
        ((x, Y, T, B), {"image_ids": ids, "text_ids": ids}),
        ((x, x, T, T), {"image_ids": ids, "text_ids": ids}),
    ):
        compiled = torch.compile(siglip_loss, fullgraph=True, backend="aot_eager")
        values = [f(*arguments, **options) for f in (compiled, eager_siglip_loss)]
        actual, exact = (torch.autograd.grad(value, x)[0] for value in values)
        assert error(values[0], values[1]) <= 1e-13
        assert error(actual, exact) <= 1e-13


def test_vmap_with_ids_and_chosen_negatives():
    ids = torch.tensor([[0, 1, 1, -1, 2, 3], [3, 2, 2, 1, -4, 0]])
    features = torch.stack([X, Y])
    for negatives in (None, Random(0.5, seed=3), Hardest(0.5)):

        def loss(x, i, negatives=negatives):
            return siglip_loss(x, Y, T, B, image_ids=i, text_ids=ids[0], negatives=negatives)

        actual = torch.func.vmap(torch.func.grad(loss))(features, ids)
        expected = [torch.func.grad(loss)(x, i) for x, i in zip(features, ids, strict=True)]
        assert torch.equal(actual, torch.stack(expected))


def test_vmap_over_nothing_is_refused():
    with pytest.raises(RuntimeError, match="over a dimension of size 0: expected one"):
        torch.func.vmap(lambda x: siglip_loss(x, Y, T, B))(X[None][:0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_under_torch_func(dtype):
    """The bits of backward, in the dtypes of the inputs."""
    inputs = make_inputs(40, 40, 8, dtype)
    expected = torch.autograd.grad(siglip_loss(*inputs.tensors()), inputs.tensors())
    actual = torch.func.grad(siglip_loss, argnums=(0, 1, 2, 3))(
        *(t.detach() for t in inputs.tensors())
    )
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("negatives", [None, Random(0.5, seed=3), Hardest(0.5)])
@pytest.mark.parametrize("seeds", [range(3)])
def test_nothing_is_compiled_again_for_another_batch_or_seed(negatives, seeds):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def loss(x, y, negatives):
        return siglip_loss(x, y, 10.0, -10.0, negatives=negatives)

    for seed in seeds:
        for n in (48, 32, 7):
            inputs = make_inputs(n, n, 8)
            chosen = Random(0.5, seed=seed + 5) if isinstance(negatives, Random) else negatives
            loss(inputs.image_features, inputs.text_features, chosen).backward()
    assert counter.frame_count <= 2  # the second once a number has been seen to change


# --- what hooks hold ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["default hooks", "hooks on the node"])
def test_what_a_saved_tensor_hook_holds_stays_as_it_is(dtype, how):
    inputs = make_inputs(20, 20, 8, dtype)
    expected = torch.autograd.grad(siglip_loss(*inputs.tensors()), inputs.tensors())
    held = []

    def pack(tensor):
        held.append((tensor, tensor.detach().clone()))
        return tensor

    if how == "default hooks":
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = siglip_loss(*inputs.tensors())
    else:
        loss = siglip_loss(*inputs.tensors())
        for saved in loss.grad_fn._raw_saved_tensors:
            saved.register_hooks(pack, lambda tensor: tensor)
    actual = torch.autograd.grad(loss, inputs.tensors())
    assert len(held) >= 4
    assert all(torch.equal(tensor, copy) for tensor, copy in held)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_gradients_are_scaled_in_place_where_nothing_holds_them(upstream):
    """Else a step would take the memory of its gradients twice."""
    inputs = make_inputs(20, 20, 8)
    loss = siglip_loss(*inputs.tensors())
    saved = loss.grad_fn.saved_tensors[1]
    (grad,) = torch.autograd.grad(loss * upstream, inputs.image_features)
    assert grad.data_ptr() == saved.data_ptr()
    assert not grad.requires_grad


# --- counts and precision ---

FLOPS = [
    # requires_grad of the four, options, products of M N D
    ((True, True, True, True), {}, 3),
    ((False, True, True, True), {}, 2),
    ((True, False, False, False), {}, 2),
    ((False, False, True, True), {}, 1),
    ((False, False, False, False), {}, 1),
    ((True, True, True, True), {"negatives": Random(0.5, seed=1)}, 3),
    ((True, True, True, True), {"negatives": Hardest(0.5)}, 5),
]


@pytest.mark.parametrize("requires_grad,options,products", FLOPS)
def test_flop_counter(requires_grad, options, products):
    inputs = make_inputs(12, 9, 8, ids=True, requires_grad=requires_grad)
    with FlopCounterMode(display=False) as counter:
        loss = siglip_loss(*inputs.tensors(), **inputs.ids, **options)
        if loss.requires_grad:
            loss.backward()
    assert counter.get_total_flops() == 2 * products * 12 * 9 * 8


def test_flop_counter_of_a_compiled_step_and_without_gradients():
    inputs = make_inputs(12, 12, 8)
    torch._dynamo.reset()
    compiled = torch.compile(siglip_loss, backend="aot_eager")
    compiled(*inputs.tensors()).backward()
    with FlopCounterMode(display=False) as counter:
        compiled(*inputs.tensors()).backward()
    assert counter.get_total_flops() == 6 * 12 * 12 * 8
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        siglip_loss(*inputs.tensors())
    assert counter.get_total_flops() == 2 * 12 * 12 * 8


@pytest.fixture
def restored_precision():
    yield
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("where", ["backends", "cuda"])
def test_precision_that_was_set_by_the_newer_attribute(
    restored_precision, backend, device, dtype, where
):
    inputs = make_inputs(70, 70, 16, dtype, device=device)
    expected = siglip_loss(*inputs.tensors(), backend=backend)
    place = torch.backends if where == "backends" else torch.backends.cuda.matmul
    place.fp32_precision = "tf32"
    loss = siglip_loss(*inputs.tensors(), backend=backend)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)  # tf32 has ten bits


# --- the page ---


def test_every_cell_of_the_page_is_run_here():
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", PAGE.read_text(), re.M)[1:]
    found = {row: (eager, compiled) for row, eager, compiled in rows}
    for row in EXACT:
        assert found[row][0].startswith("exact"), row
        assert found[row][1].startswith("exact" if row in COMPILED else "-"), row
    for row in REFUSED:
        assert found[row][0].startswith("refused"), row
        compiled = row in COMPILED_REFUSED["eager"]
        assert found[row][1].startswith("refused" if compiled else "-"), row
    elsewhere = {row for row in found if "test_" in found[row][0]}
    assert set(found) == set(EXACT) | set(REFUSED) | elsewhere
