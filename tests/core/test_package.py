"""What is built, what it holds, and that it works where nothing else is installed."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fused_siglip
from support.project import project

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def distributions(tmp_path_factory):
    """Wheel and source distribution, built from a copy: setuptools writes into the tree it builds,
    and other workers may be building at the same time."""
    pytest.importorskip("build")
    tree = tmp_path_factory.mktemp("tree")
    for name in ("fused_siglip", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def sources() -> set[str]:
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fused_siglip").rglob("*.py")}
    package.add("fused_siglip/py.typed")
    return package | {f"fused_siglip/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}


def test_wheel_holds_the_package_and_nothing_else(distributions):
    wheel, _ = distributions
    assert fused_siglip.__version__ in wheel.name
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == sources()


def test_wheel_works_on_its_own(distributions, tmp_path):
    wheel, _ = distributions
    zipfile.ZipFile(wheel).extractall(tmp_path)
    out = run(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch, fused_siglip\n"
        "x = torch.eye(3, requires_grad=True)\n"
        "fused_siglip.siglip_loss(x, x, 10.0, -10.0).backward()\n"
        "print(fused_siglip.__file__, x.grad.isfinite().all().item())"
    )
    assert out.split() == [str(tmp_path / "fused_siglip/__init__.py"), "True"]


CONSUMER = """
import torch
from fused_siglip import LearnableSigLipLoss, Random, SigLipLoss, siglip_loss

x = torch.zeros(4, 8)
siglip_loss(x, x, 10.0, -10.0, negatives=Random(0.5, seed=1), group="world")
LearnableSigLipLoss(max_logit_scale=100)(x, x, negatives=None)
SigLipLoss(world_size=2)(x, x, 10.0, None)
"""


def test_a_user_of_the_wheel_is_type_checked(distributions, tmp_path):
    pytest.importorskip("mypy")
    wheel, _ = distributions
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    # torch is left out: reading it takes most of a minute
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n")

    def mypy(code: str) -> str:
        (tmp_path / "use.py").write_text(code)
        return subprocess.run(
            [sys.executable, "-m", "mypy", "use.py"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
            capture_output=True,
            text=True,
        ).stdout

    assert mypy(CONSUMER).startswith("Success")
    wrong = mypy(f"{CONSUMER}siglip_loss(x, x, 10.0, reduction=3)\nsiglip_loss(x, x, 1.0, keep=1)")
    assert "incompatible type" in wrong and "Unexpected keyword" in wrong
    assert "Found 2 errors" in wrong


def test_metadata(distributions):
    wheel, _ = distributions
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert [r for r in required if "extra ==" not in r] == ["Requires-Dist: torch>=2.10"]
    extras = {
        line.split()[1] for line in metadata.splitlines() if line.startswith("Provides-Extra")
    }
    stacks = {"open-clip", "transformers", "sentence-transformers"}
    assert extras == {"test", "bench", "demo", "dev", "docs", "triton"} | stacks
    assert "License-Expression: Apache-2.0" in metadata or "License: Apache-2.0" in metadata
    assert f"Version: {fused_siglip.__version__}\n" in metadata


def test_links_of_the_long_description_lead_into_the_repository(distributions):
    """An index shows README.md without the files beside it."""
    wheel, _ = distributions
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        description = archive.read(name).decode().partition("\n\n")[2]
    assert "# fused_siglip" in description
    links = re.findall(r"\]\(([^)\s]+)\)", description)
    assert len(links) > 20
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    base = project()["urls"]["Repository"]
    assert f"({base}/blob/main/docs/limits.md)" in description
    assert f"]({base}/raw/main/docs/demo_emoji.png)" in description


def test_sdist_builds_the_same(distributions):
    _, sdist = distributions
    with tarfile.open(sdist) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    # kernels/ is in it where its link is, so that the wheel is built from it alike
    assert {*sources(), "setup.py", "README.md", "LICENSE"} <= names


def test_import_touches_neither_triton_nor_a_device():
    out = run(
        "import sys, torch\n"
        "import fused_siglip\n"
        "print('triton' in sys.modules, torch.cuda.is_initialized())"
    )
    assert out.split() == ["False", "False"]


def test_loss_runs_where_triton_is_not_installed():
    out = run(
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch, fused_siglip\n"
        "x = torch.eye(4, requires_grad=True)\n"
        "fused_siglip.siglip_loss(x, x, 10.0, -10.0).backward()\n"
        "try: fused_siglip.siglip_loss(x, x, 1.0, backend='triton')\n"
        "except ValueError as error: print(error)"
    )
    assert "triton is not installed" in out


def test_no_warning_of_ours_on_import_and_use():
    run(
        "import torch, warnings\n"
        "warnings.simplefilter('error')\n"
        "import fused_siglip\n"
        "x = torch.eye(4, requires_grad=True)\n"
        "fused_siglip.siglip_loss(x, x, 10.0, -10.0).backward()"
    )
