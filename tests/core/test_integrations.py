"""The integrations where no training stack is installed: errors, and nothing imported too early."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fused_siglip.integrations import require
from support.project import name_of, project


def test_nothing_is_imported_before_it_is_used():
    code = (
        "import sys, fused_siglip\n"
        "print('fused_siglip.integrations' in sys.modules)\n"
        "import fused_siglip.integrations.open_clip\n"
        "print([m for m in ('open_clip', 'torchvision', 'packaging') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "[]"], done.stderr


def test_extras_ask_for_the_versions_that_the_integrations_take():
    root = Path(__file__).resolve().parents[2]
    optional = project()["optional-dependencies"]
    required = {}
    for file in (root / "fused_siglip/integrations").glob("[a-z]*.py"):
        required |= dict(re.findall(r'require\("([\w-]+)", "([^"]+)"\)', file.read_text()))
    extras = {}
    for extra in ("open-clip", "transformers", "sentence-transformers"):
        (requirement,) = optional[extra]
        name = name_of(requirement)
        extras[name] = re.sub(r"^\[\w+\]", "", requirement.removeprefix(name))
    assert extras == required


def test_a_missing_stack_is_named():
    with pytest.raises(ImportError) as caught:
        require("no-such-stack", ">=1,<2")
    assert "no-such-stack is not installed: expected no-such-stack>=1,<2" in str(caught.value)


def test_a_version_that_was_not_tried_is_named(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.1")
    with pytest.raises(ImportError) as caught:
        require("some-stack", ">=1,<9")
    words = "some-stack 9.1 is installed: this integration is known to work with some-stack>=1,<9"
    assert words in str(caught.value)
    require("some-stack", ">=9,<10")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.2.0.dev0")
    require("some-stack", ">=9,<10")  # installed from a repository
