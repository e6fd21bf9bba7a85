"""Hugging Face's `kernels` loads the layout from a folder (make test-kernel-hub).

The package is not installed beside it, and the repository's kernels/ is not on the path.
"""

import pytest
import torch
from kernels import (
    LocalLayerRepository,
    Mode,
    get_loaded_kernels,
    get_local_kernel,
    kernelize,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
)
from kernels._rust import Digest, DigestAlgorithm, Metadata

from support.kernel_hub import layout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    layout.write(folder)
    return folder


def features() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(40, 16, generator=generator) for _ in range(2)]
    return [torch.nn.functional.normalize(f).requires_grad_() for f in drawn]


def definition(x, y, t, b):  # (B, D), (B, D), numbers
    """Algorithm 1 of the paper, in float64."""
    labels = 2 * torch.eye(len(x), dtype=torch.float64) - 1
    logits = t * x.double() @ y.double().T + b
    return -torch.nn.functional.logsigmoid(labels * logits).sum() / len(x)


@use_kernel_forward_from_hub("SigLipLoss")
class SigLipLoss(torch.nn.Module):
    """What open_clip's class has, and a forward that must not be called."""

    def __init__(self):
        super().__init__()
        self.world_size, self.dist_impl = 1, None

    def forward(
        self, image_features, text_features, logit_scale, logit_bias, output_dict=False
    ):  # fmt: skip
        raise AssertionError("the layer was not replaced")


def test_digest_is_the_librarys_own(folder):
    for backend in layout.BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        metadata = Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))


def test_function(folder):
    kernel = get_local_kernel(folder)
    assert [k.metadata.name.python_name for k in get_loaded_kernels()] == ["fused_siglip"]
    leaves = features()
    actual = kernel.siglip_loss(*leaves, 10.0, -10.0)
    expected = definition(*leaves, 10.0, -10.0)
    torch.testing.assert_close(actual, expected.float())


def test_layer_replaces_a_forward(folder):
    model = torch.nn.ModuleDict({"loss": SigLipLoss()})
    repository = LocalLayerRepository(folder, layer_name="SigLipLoss")
    with use_kernel_mapping({"SigLipLoss": {"cpu": repository}}):
        kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
    leaves = features()
    loss = model["loss"](*leaves, 10.0, -10.0)
    loss.backward()
    expected = definition(*leaves, 10.0, -10.0)
    grads = torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(loss, expected.float())
    for leaf, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(leaf.grad, grad)
    named = model["loss"](*leaves, 10.0, -10.0, output_dict=True)
    assert list(named) == ["contrastive_loss"] and torch.equal(named["contrastive_loss"], loss)
