"""Every bad call: what was passed, which error it raises, and the words its message holds."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fused_siglip import SigLipLoss, siglip_loss
from fused_siglip.kernels import check_backend, default_backend, why_not_default
from fused_siglip.testing import eager_siglip_loss

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(4)

# (what is wrong, arguments that differ from a good call, error, words of the message)
BAD_CALLS = [
    ("rank 3", {"image_features": X[None]}, ValueError, "image_features has shape (1, 4, 8): expected (batch, D)"),
    ("rank 1", {"text_features": X[0]}, ValueError, "text_features has shape (8,): expected (batch, D)"),
    ("D mismatch", {"text_features": X[:, :5]}, ValueError, "text_features has D = 5 and image_features D = 8: expected the same"),
    ("M != N", {"text_features": X[:3]}, ValueError, "text_features has 3 rows and image_features 4: expected the same number, or image_ids and text_ids"),
    ("mixed dtypes", {"text_features": X.bfloat16()}, TypeError, "text_features has dtype torch.bfloat16 and image_features torch.float32: expected the same"),
    ("integer features", {"image_features": X.long()}, TypeError, "image_features has dtype torch.int64: expected float32, bfloat16, float16 or float64"),
    ("bool features", {"image_features": X > 0}, TypeError, "image_features has dtype torch.bool"),
    ("complex features", {"text_features": X + 0j}, TypeError, "text_features has dtype torch.complex64"),
    ("float8 features", {"image_features": X.to(torch.float8_e4m3fn)}, TypeError, "image_features has dtype torch.float8_e4m3fn"),
    ("numpy features", {"image_features": X.numpy()}, TypeError, "image_features is a numpy.ndarray: expected a tensor of shape (batch, D)"),
    ("list features", {"text_features": X.tolist()}, TypeError, "text_features is a list: expected a tensor"),
    ("no features", {"image_features": None}, TypeError, "image_features is a NoneType: expected a tensor"),
    ("meta features", {"image_features": X.to("meta")}, ValueError, "image_features is on the meta device"),
    ("sparse features", {"text_features": X.to_sparse()}, TypeError, "text_features has layout torch.sparse_coo: expected a dense"),
    ("scale of two elements", {"logit_scale": torch.ones(2)}, ValueError, "logit_scale has shape (2,): expected one element"),
    ("bias of shape (1, 1)", {"logit_bias": torch.ones(1, 1)}, ValueError, "logit_bias has shape (1, 1): expected one element, () or (1,)"),
    ("empty scale", {"logit_scale": torch.ones(0)}, ValueError, "logit_scale has shape (0,): expected one element"),
    ("integer scale tensor", {"logit_scale": torch.tensor(10)}, TypeError, "logit_scale has dtype torch.int64: expected a floating dtype"),
    ("no scale", {"logit_scale": None}, TypeError, "logit_scale is a NoneType: expected a number or a tensor of one element"),
    ("string bias", {"logit_bias": "-10"}, TypeError, "logit_bias is a str: expected a number"),
    ("complex scale", {"logit_scale": 1j}, TypeError, "logit_scale is a complex: expected a number"),
    ("bool bias", {"logit_bias": True}, TypeError, "logit_bias is a bool: expected a number"),
    ("numpy scale", {"logit_scale": np.ones(1)}, TypeError, "logit_scale is a numpy.ndarray"),
    ("scale on another device", {"logit_scale": torch.ones((), device="meta")}, ValueError, "logit_scale is on the meta device"),
    ("image_ids alone", {"image_ids": IDS}, ValueError, "image_ids was given without text_ids: expected both or neither"),
    ("text_ids alone", {"text_ids": IDS}, ValueError, "text_ids was given without image_ids: expected both or neither"),
    ("ids of the wrong length", {"image_ids": IDS, "text_ids": IDS[:3]}, ValueError, "text_ids has shape (3,): expected (4,), one id a row"),
    ("ids of rank 2", {"image_ids": IDS[:, None], "text_ids": IDS}, ValueError, "image_ids has shape (4, 1): expected (4,)"),
    ("float ids", {"image_ids": IDS, "text_ids": IDS.float()}, TypeError, "text_ids has dtype torch.float32: expected an integer dtype"),
    ("bool ids", {"image_ids": IDS > 1, "text_ids": IDS}, TypeError, "image_ids has dtype torch.bool: expected an integer dtype"),
    ("list ids", {"image_ids": [0, 1, 2, 3], "text_ids": IDS}, TypeError, "image_ids is a list: expected an integer tensor of shape (batch,)"),
    ("negative_only = 1", {"negative_only": 1}, TypeError, "negative_only is a int: expected a bool"),
    ("unknown reduction", {"reduction": "max"}, ValueError, "reduction is 'max': expected 'mean' or 'sum' or 'none'"),
    ("unknown backend", {"backend": "cuda"}, ValueError, "backend is 'cuda': expected None, 'torch' or 'triton'"),
    ("workspace of 0", {"workspace_bytes": 0}, ValueError, "workspace_bytes is 0: expected more than 0"),
    ("float workspace", {"workspace_bytes": 1e9}, TypeError, "workspace_bytes is a float: expected a number of bytes (int)"),
    ("workspace of 2**63", {"workspace_bytes": 2**63}, ValueError, "workspace_bytes does not fit 63 bits: expected less than 2**63"),
    ("negative workspace", {"workspace_bytes": -1}, ValueError, "workspace_bytes is -1: expected more than 0"),
    ("bool workspace", {"workspace_bytes": True}, TypeError, "workspace_bytes is a bool: expected a number of bytes (int)"),
    ("reduction of None", {"reduction": None}, TypeError, "reduction is a NoneType: expected 'mean' or 'sum'"),
    ("scale beyond float32", {"logit_scale": 1e300}, ValueError, "logit_scale does not fit torch.float32: expected 3.4e+38 at most"),
    ("bias of 401 digits", {"logit_bias": -(10**400)}, ValueError, "logit_bias does not fit torch.float32: expected 3.4e+38 at most"),
    ("scale beyond float64", {"image_features": X.double(), "text_features": X.double(), "logit_scale": 10**400}, ValueError, "logit_scale does not fit torch.float64: expected 1.8e+308 at most"),
    ("unsigned 64-bit ids", {"image_ids": IDS, "text_ids": IDS.to(torch.uint64)}, TypeError, "text_ids has dtype torch.uint64: expected one that int64 can hold"),
    ("ids of another batch", {"image_ids": torch.arange(5), "text_ids": IDS}, ValueError, "image_ids has shape (5,): expected (4,), one id a row"),
    ("no rows on one side", {"image_features": X[:0]}, ValueError, "text_features has 4 rows and image_features 0: expected the same number"),
    ("D of 0 on one side", {"text_features": X[:, :0]}, ValueError, "text_features has D = 0 and image_features D = 8: expected the same"),
    ("empty ids", {"image_ids": IDS[:0], "text_ids": IDS}, ValueError, "image_ids has shape (0,): expected (4,)"),
    ("meta ids", {"image_ids": IDS, "text_ids": IDS.to("meta")}, ValueError, "text_ids is on the meta device"),
    ("group of another name", {"group": "all"}, TypeError, "group is 'all': expected None, 'world' or a torch.distributed.ProcessGroup"),
    ("group this rank is not in", {"group": dist.GroupMember.NON_GROUP_MEMBER}, TypeError, "group is a int: expected a torch.distributed.ProcessGroup this rank is in"),
    ("dist_impl in a list", {"dist_impl": ["ring"]}, TypeError, "dist_impl is a list: expected None, 'ring' or 'gather'"),
    ("workspace below one tile", {"workspace_bytes": 100, "backend": "torch"}, ValueError, "workspace_bytes=100 cannot hold one 4 x 4 tile of the torch backend: expected at least 176"),
    ("float64 on triton", {"image_features": X.double(), "text_features": X.double(), "backend": "triton"}, ValueError, "backend='triton' cannot run here:"),
]  # fmt: skip


@pytest.mark.parametrize(
    "arguments,exception,words", [row[1:] for row in BAD_CALLS], ids=[row[0] for row in BAD_CALLS]
)
def test_bad_call(arguments, exception, words):
    good = {
        "image_features": X.clone().requires_grad_(),
        "text_features": X.clone(),
        "logit_scale": 10.0,
        "logit_bias": -10.0,
    }
    assert siglip_loss(**good).isfinite()
    with pytest.raises(exception) as caught:
        siglip_loss(**(good | arguments))
    assert words in str(caught.value)


# Makers of values of the wrong kind, and the arguments for which each is right all the same.
WRONG_KINDS = {
    "numpy array": (lambda: np.ones((4, 8), np.float32), ()),
    "numpy ids": (lambda: np.arange(4), ()),
    "list": (lambda: [0.0, 1.0], ()),
    "tuple": (lambda: (1,), ()),
    "dict": (lambda: {}, ()),
    "string": (lambda: "10", ()),
    "bytes": (lambda: b"mean", ()),
    "object": (lambda: object(), ()),
    "function": (lambda: torch.relu, ()),
    "class": (lambda: torch.Tensor, ()),
    "None": (lambda: None, ("logit_bias", "backend", "workspace_bytes", "dist_impl", "group")),
    "bool": (lambda: True, ("negative_only",)),
    "complex": (lambda: 1j, ()),
    "meta tensor": (lambda: X.to("meta"), ()),
    "meta scalar": (lambda: torch.ones((), device="meta"), ()),
    "sparse tensor": (lambda: X.to_sparse(), ()),
    "sparse rows": (lambda: X.to_sparse_csr(), ()),
    "nested tensor": (lambda: torch.nested.nested_tensor([X[0], X[1]]), ()),
    "quantized tensor": (lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.quint8), ()),
    "complex tensor": (lambda: X + 0j, ()),
    "bool tensor": (lambda: X > 0, ()),
    "integer scalar": (lambda: torch.tensor(1), ()),
    "one row": (lambda: X[0], ()),
    "three axes": (lambda: X[None], ()),
}
ARGUMENTS = (
    *("image_features", "text_features", "logit_scale", "logit_bias", "image_ids", "text_ids"),
    *("negative_only", "reduction", "group", "dist_impl", "workspace_bytes", "backend"),
)


@pytest.mark.filterwarnings("ignore:.*(beta|prototype) st")  # torch's own, of sparse and nested
@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("make,right_for", WRONG_KINDS.values(), ids=WRONG_KINDS)
def test_every_wrong_kind_of_every_argument(name, make, right_for):
    arguments = {"image_features": X, "text_features": X, "logit_scale": 10.0, "logit_bias": -10.0}
    if name in ("image_ids", "text_ids"):
        arguments |= {"image_ids": IDS, "text_ids": IDS}
    arguments[name] = make()
    if name in right_for:
        assert siglip_loss(**arguments).isfinite()
        return
    with pytest.raises((TypeError, ValueError)) as caught:
        siglip_loss(**arguments)
    message = str(caught.value)
    assert name in message
    assert ("expected" in message) or ("meta device" in message)


# What is no error, however odd: (what is odd, arguments, what comes out)
NAN, INF = float("nan"), float("inf")
ODD_CALLS = [
    ("scale of 0", {"logit_scale": 0.0}, "as eager"),
    ("scale below 0", {"logit_scale": -5.0}, "as eager"),
    ("integer scale", {"logit_scale": 10}, "as eager"),
    ("large integer scale", {"logit_scale": 2**70}, "as eager"),
    ("numpy scalar", {"logit_scale": np.float32(3), "logit_bias": np.int64(-2)}, "as eager"),
    ("fraction", {"logit_scale": Fraction(7, 2)}, "as eager"),
    ("NaN scale", {"logit_scale": NAN}, "nan"),
    ("NaN bias", {"logit_bias": NAN}, "nan"),
    ("infinite bias", {"logit_bias": INF}, "inf"),
    ("infinite bias below", {"logit_bias": -INF}, "inf"),
    ("infinite scale", {"logit_scale": INF}, "inf"),
    ("NaN scale tensor", {"logit_scale": torch.tensor(NAN)}, "nan"),
    ("NaN images", {"image_features": X * NAN}, "nan"),
    ("infinite texts", {"text_features": X + INF}, "nan"),
    ("small ids", {"image_ids": IDS.to(torch.uint8), "text_ids": IDS.to(torch.int16)}, "as eager"),
    ("ids of 32 bits without sign", dict.fromkeys(("image_ids", "text_ids"), (IDS + 2**31).to(torch.uint32)), "as eager"),
    ("the largest ids", dict.fromkeys(("image_ids", "text_ids"), 2**63 - 1 - IDS), "as eager"),
    ("the smallest ids", {"image_ids": IDS - 2**63, "text_ids": IDS}, "0"),
    ("no rows", {"image_features": X[:0], "text_features": X[:0]}, "0"),
    ("no images", {"image_features": X[:0], "negative_only": True}, "0"),
    ("no texts", {"text_features": X[:0], "negative_only": True}, "0"),
    ("no features", {"image_features": X[:, :0], "text_features": X[:, :0]}, "as eager"),
    ("no rows with ids", {"image_features": X[:0], "image_ids": IDS[:0], "text_ids": IDS}, "0"),
]  # fmt: skip


@pytest.mark.parametrize(
    "arguments,expected", [row[1:] for row in ODD_CALLS], ids=[row[0] for row in ODD_CALLS]
)
def test_odd_call_that_is_no_error(arguments, expected):
    call = {
        "image_features": X,
        "text_features": X.flip(0),
        "logit_scale": 10.0,
        "logit_bias": -1.0,
    }
    call |= arguments
    leaves = {
        k: call[k].detach().clone().requires_grad_() for k in ("image_features", "text_features")
    }
    loss = siglip_loss(**(call | leaves))
    loss.backward()
    if expected == "as eager":
        scalars = {k: float(call[k]) for k in ("logit_scale", "logit_bias")}
        ids = {k: v.long() for k, v in call.items() if k.endswith("ids")}
        doubles = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
        exact = eager_siglip_loss(**(call | doubles | scalars | ids))
        exact.backward()
        torch.testing.assert_close(loss, exact.float())
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad.double(), doubles[name].grad, rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(loss, torch.tensor(float(expected)), equal_nan=True)
        assert expected != "0" or not any(leaf.grad.any() for leaf in leaves.values())


def test_rows_further_apart_than_31_bits(backend, device):
    """Offsets are 64-bit: the memory between the rows is never touched."""
    apart = 2**31 // 3 + 1
    wide = torch.empty(3 * apart + 8, dtype=torch.float16, device=device).as_strided(
        (4, 8), (apart, 1)
    )
    wide.copy_(X)
    call = {"logit_scale": 10.0, "logit_bias": -10.0, "backend": backend}
    expected = siglip_loss(X.half().to(device), X.half().to(device), **call)
    assert torch.equal(siglip_loss(wide, X.half().to(device), **call), expected)
    assert torch.equal(siglip_loss(X.half().to(device), wide, **call), expected)


def test_devices_that_differ():
    """Two devices without a second device: a tensor that says it lies elsewhere."""

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("cuda", 1)

    there = X.as_subclass(Elsewhere)
    with pytest.raises(ValueError, match="text_features is on cuda:1 and image_features on cpu"):
        siglip_loss(X, there, 1.0)
    with pytest.raises(ValueError, match="logit_scale is on cuda:1: expected cpu, as the features"):
        siglip_loss(X, X, torch.ones(()).as_subclass(Elsewhere))
    with pytest.raises(ValueError, match="text_ids is on cuda:1: expected cpu"):
        siglip_loss(X, X, 1.0, image_ids=IDS, text_ids=IDS.as_subclass(Elsewhere))
    with pytest.raises(ValueError, match="text_weights is on cuda:1: expected cpu"):
        siglip_loss(X, X, 1.0, text_weights=torch.ones(len(X)).as_subclass(Elsewhere))


def test_triton_asked_for_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a CUDA or ROCm device, not cpu"):
        siglip_loss(X, X, 1.0, backend="triton")


@pytest.mark.parametrize(
    "capability,dtype,expected",
    [
        ((8, 0), torch.bfloat16, "triton"),
        ((9, 0), torch.float32, "triton"),
        ((7, 5), torch.float16, "torch"),
        ((9, 0), torch.float64, "torch"),
    ],
)
def test_what_a_cuda_device_gets_by_default(monkeypatch, capability, dtype, expected):
    monkeypatch.setattr("fused_siglip.kernels.registry._TRITON_INSTALLED", True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    found = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: found)
    assert default_backend("cuda", dtype) == expected
    obstacle = why_not_default("cuda", dtype)
    assert (obstacle is None) == (expected == "triton")
    if capability < (8, 0):
        with pytest.raises(
            ValueError, match="backend='triton' cannot run here: it needs CUDA comp"
        ):
            check_backend("triton", torch.device("cuda"), dtype)
        assert "compute capability 8.0 or newer, this device has 7.5" in obstacle


def test_triton_asked_for_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("fused_siglip.kernels.registry._TRITON_INSTALLED", False)
    with pytest.raises(ValueError, match="triton is not installed"):
        siglip_loss(X, X, 1.0, backend="triton")


@pytest.mark.parametrize(
    "arguments,exception,words",
    [
        (
            {"dist_impl": "alltoall"},
            ValueError,
            "dist_impl is 'alltoall': expected None, 'ring' or",
        ),
        ({"rank": 1}, ValueError, "rank is 1: expected 0 to 0"),
        ({"rank": -1}, ValueError, "rank is -1"),
        ({"world_size": 0}, ValueError, "world_size is 0: expected at least 1"),
        ({"world_size": "2"}, TypeError, "world_size is a str: expected an int"),
        ({"world_size": None}, TypeError, "world_size is a NoneType: expected an int"),
        ({"rank": 0.0}, TypeError, "rank is a float: expected an int"),
        ({"rank": torch.tensor(0)}, TypeError, "rank is a torch.Tensor: expected an int"),
        ({"rank": True, "world_size": 2}, TypeError, "rank is a bool: expected an int"),
        ({"group": 0}, TypeError, "group is a int: expected a torch.distributed.ProcessGroup"),
        ({"dist_impl": ["ring"]}, TypeError, "dist_impl is a list: expected None, 'ring' or"),
    ],
)
def test_bad_constructor_call(arguments, exception, words):
    with pytest.raises(exception) as caught:
        SigLipLoss(**arguments)
    assert words in str(caught.value)


def test_distributed_asked_for_without_a_process_group():
    with pytest.raises(ValueError, match="expected init_process_group before the loss"):
        siglip_loss(X, X, 1.0, dist_impl="ring")
    with pytest.raises(ValueError, match="world_size is 2 without"):
        SigLipLoss(rank=1, world_size=2)(X, X, 1.0, 0.0)
