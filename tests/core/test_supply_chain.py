"""What runs in CI is pinned; what runs at a user's opens no connection, file or pickle."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.project import name_of, project

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / ".ci/constraints.txt"
FOREIGN = {"pickle", "marshal", "shelve", "socket", "ssl", "urllib", "http", "requests", "ctypes"}
SOURCES = [*(ROOT / "fused_siglip").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]


def test_tools_of_the_dev_extra_are_pinned():
    pinned = set(re.findall(r"^([\w.-]+)==", CONSTRAINTS.read_text(), re.MULTILINE))
    extras = project()["optional-dependencies"]
    tools = {name_of(r) for e in ("test", "bench", "demo", "dev", "docs") for r in extras[e]}
    named = tools - {"fused-siglip"}  # dev names other extras by it
    assert {"pytest", "hypothesis", "numpy", "mypy"} <= named
    assert named <= pinned
    assert "-c .ci/constraints.txt" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_module_that_connects_unpickles_or_loads_binaries(path):
    tree = ast.parse(path.read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    assert not {name.split(".")[0] for name in imported} & FOREIGN
    called = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert not called & {"open", "eval", "exec", "torch.load", "torch.save", "os.system"}


def test_a_step_opens_no_connection_and_writes_no_file(tmp_path):
    """Every event that Python audits: no socket, no process, no file opened to write."""
    code = (
        "import sys, torch, fused_siglip\n"
        "seen = []\n"
        "def hook(event, arguments):\n"
        "    mode = arguments[1] if event == 'open' else None\n"
        "    writes = isinstance(mode, str) and set('wax+') & set(mode)\n"
        "    if writes or event.startswith(('socket.', 'subprocess.', 'os.exec', 'urllib.')):\n"
        "        seen.append((event, arguments))\n"
        "x = torch.randn(300, 8, requires_grad=True)\n"
        "sys.addaudithook(hook)\n"
        "fused_siglip.siglip_loss(x, x, 10.0, -10.0).backward()\n"
        "assert not seen, seen\n"
        "open('written', 'w').close()\n"
        "assert len(seen) == 1\n"  # the hook sees what it should
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
