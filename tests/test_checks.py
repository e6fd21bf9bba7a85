"""Every bad call: what was passed, which error it raises, and the words its message holds."""

import numpy as np
import pytest
import torch

from fused_siglip import SigLipLoss, siglip_loss

X = torch.randn(4, 8)
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
    ("list ids", {"image_ids": [0, 1, 2, 3], "text_ids": IDS}, TypeError, "image_ids is a list: expected an integer tensor of shape (4,)"),
    ("negative_only = 1", {"negative_only": 1}, TypeError, "negative_only is a int: expected a bool"),
    ("unknown reduction", {"reduction": "none"}, ValueError, "reduction is 'none': expected 'mean' or 'sum'"),
    ("unknown backend", {"backend": "cuda"}, ValueError, "backend is 'cuda': expected None, 'torch' or 'triton'"),
    ("workspace of 0", {"workspace_bytes": 0}, ValueError, "workspace_bytes is 0: expected more than 0"),
    ("float workspace", {"workspace_bytes": 1e9}, TypeError, "workspace_bytes is a float: expected a number of bytes (int)"),
    ("workspace below one tile", {"workspace_bytes": 100, "backend": "torch"}, ValueError, "workspace_bytes=100 cannot hold one 4 x 4 tile of the torch backend: expected at least 144"),
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


def test_triton_asked_for_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a CUDA or ROCm device, not cpu"):
        siglip_loss(X, X, 1.0, backend="triton")


def test_triton_asked_for_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("fused_siglip.kernels._TRITON_INSTALLED", False)
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
