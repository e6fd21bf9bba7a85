"""The package as a kernel for Hugging Face's `kernels` library: docs/kernel_hub.md.

`python .ci/kernel_hub/layout.py FOLDER` writes the source tree that kernel-builder takes
(build.toml, torch-ext/) and, in build/, the pure-Python variants that `get_local_kernel` loads.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NAME = "fused_siglip"
VERSION = 0  # of the kernel's interface; 0 promises nothing yet
BACKENDS = ("cpu", "cuda", "rocm")
# Of no use without the command line, or for stacks that a kernel may not import.
LEFT_OUT = {"__main__.py", "estimate", "integrations", "testing"}

# Every build has a namespace of its own for its operators, since several may be loaded at once.
NAMESPACED = (
    (re.compile(rf'f"{NAME}::\{{name\}}"'), "add_op_namespace_prefix(name)"),
    (re.compile(rf'Library\("{NAME}"'), 'Library(add_op_namespace_prefix("")[:-2]'),
    (re.compile(rf"torch\.ops\.{NAME}\b"), "ops"),
)
LEFTOVER = re.compile(rf'{NAME}::|torch\.ops\.{NAME}|Library\("{NAME}')

BUILD_TOML = f"""\
[general]
name = "{NAME.replace("_", "-")}"
version = {VERSION}
edition = 5
license = "apache-2.0"
backends = {json.dumps(BACKENDS)}

[general.hub]
repo-id = "{{owner}}/{NAME.replace("_", "-")}"

[torch-noarch]
"""


def sources() -> dict[str, str]:
    """Every file of the kernel by its path in the package, but for the namespace's own."""
    found = {}
    for file in sorted((ROOT / NAME).rglob("*.py")) + sorted((ROOT / "kernels").glob("*.py")):
        if file.is_relative_to(ROOT / NAME / "kernels"):
            continue  # the link; kernels/ itself is in the list
        folder = ROOT if file.is_relative_to(ROOT / "kernels") else ROOT / NAME
        path = file.relative_to(folder)
        if path.parts[0] not in LEFT_OUT:
            found[path.as_posix()] = _namespaced(path.as_posix(), file.read_text())
    found["layers.py"] = (HERE / "layers.py").read_text()
    found["__init__.py"] = _with_layers(found["__init__.py"])
    return found


def _namespaced(path: str, text: str) -> str:
    changed = text
    for pattern, replacement in NAMESPACED:
        changed = pattern.sub(replacement, changed)
    if LEFTOVER.search(changed):
        raise ValueError(f"{path} names the operators in a way that NAMESPACED does not know")
    if changed == text:
        return text
    names = [
        name for name in ("add_op_namespace_prefix", "ops") if re.search(rf"\b{name}\b", changed)
    ]
    first = re.search(r"^from \.", changed, re.MULTILINE)
    if first is None or "/" in path:
        raise ValueError(f"{path} has no relative import beside which one of _ops can stand")
    line = f"from ._ops import {', '.join(names)}\n"
    return changed[: first.start()] + line + changed[first.start() :]


def _with_layers(text: str) -> str:
    if "__all__ = [" not in text:
        raise ValueError("__init__.py has no list of public names")
    return text.replace(
        "__all__ = [", 'from . import layers  # noqa: E402\n\n__all__ = ["layers", ', 1
    )


def owner() -> str:
    return re.search(r'^Repository = "https://[^/]+/([^/"]+)/', _pyproject(), re.MULTILINE)[1]


def _pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text()


def write(folder: Path) -> None:
    """Write the whole layout into ``folder``, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    files = sources()
    _write_all(folder / "torch-ext" / NAME, files)
    _write_all(folder, {"build.toml": BUILD_TOML.format(owner=owner())})
    for name in ("CARD.md", "flake.nix"):
        shutil.copy(HERE / name, folder)
    revision = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:7]
    for backend in BACKENDS:
        identity = f"_{NAME}_{backend}_{revision}"
        ops = (HERE / "ops.py").read_text().replace("NAMESPACE", identity)
        _write_variant(folder / "build" / f"torch-{backend}", files | {"_ops.py": ops}, identity)


def _write_variant(folder: Path, files: dict[str, str], identity: str) -> None:
    _write_all(folder, files)
    digests = {
        path: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for path, text in sorted(files.items())
    }
    metadata = {
        "name": NAME.replace("_", "-"),
        "id": identity,
        "version": VERSION,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": folder.name.removeprefix("torch-")},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    _write_all(folder, {"metadata.json": json.dumps(metadata, indent=2) + "\n"})


def _write_all(folder: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
