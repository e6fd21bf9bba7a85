"""The layout for the Kernel Hub: it stands alone, and loads beside the package itself."""

import ast
import base64
import hashlib
import importlib.util
import json
import sys

import pytest
import torch

import fused_siglip
from support.kernel_hub import layout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    layout.write(folder)
    return folder


def test_every_variant_is_described_by_its_metadata(folder):
    for backend in layout.BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend} and metadata["id"].isidentifier()
        files = {p.relative_to(variant).as_posix(): p for p in variant.rglob("*.py")}
        assert set(metadata["digest"]["files"]) == set(files)
        for path, digest in metadata["digest"]["files"].items():
            assert base64.b64decode(digest) == hashlib.sha256(files[path].read_bytes()).digest()
        assert f'"{metadata["id"]}::' in (variant / "_ops.py").read_text()


def test_modules_import_only_torch_triton_and_each_other(folder):
    source = folder / "torch-ext" / layout.NAME
    modules = list(source.rglob("*.py"))
    assert len(modules) > 30 and not (source / "integrations").exists()
    for file in modules:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                assert top in {"torch", "triton"} | sys.stdlib_module_names, (file, name)


def test_the_kernel_computes_what_the_package_computes(folder, monkeypatch):
    """Loaded as the library loads it, under its own name, beside the package."""
    variant = folder / "build/torch-cpu"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    kernel = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, kernel)
    spec.loader.exec_module(kernel)
    assert kernel.layers.SigLipLoss.__module__ == f"{name}.layers"
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(70, 16, generator=generator) for _ in range(2)]

    def run(loss):
        leaves = [torch.nn.functional.normalize(f).requires_grad_() for f in features]
        value = loss(*leaves, 10.0, -10.0)
        return [value, *torch.autograd.grad(value, leaves)]

    ours = run(fused_siglip.siglip_loss)
    compiled = torch.compile(kernel.siglip_loss, fullgraph=True, backend="aot_eager")
    for theirs in (run(kernel.siglip_loss), run(compiled)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert hasattr(torch.ops, name)
    assert getattr(torch.ops, name).loss_and_grads is not torch.ops.fused_siglip.loss_and_grads
    for module in [m for m in sys.modules if m.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, module)


def test_an_operator_named_in_another_way_is_an_error():
    with pytest.raises(ValueError, match=r"sweep\.py names the operators in a way"):
        layout._namespaced("sweep.py", 'op = torch.library.get("fused_siglip::loss_and_grads")')
