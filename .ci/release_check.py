"""`make release-check`: what a stranger does on the day of a release, in an empty environment.

Builds both distributions from a copy of the tree, checks them, uploads them to a package index on
this machine, installs from it, and runs the self-check and an example for each extra.
docs/releasing.md says what that covers. Nothing outside a temporary folder is written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "fused-siglip"
TOOLS = ("build", "twine", "check-wheel-contents", "pypiserver")
KEPT = re.compile(r"PATH|LANG|LC_\w+|SSL_CERT_\w+|REQUESTS_CA_BUNDLE|PIP_\w+|\w+_proxy|\w+_PROXY")
STACK_PAGES = ("open_clip", "transformers", "sentence_transformers")


class Machine:
    """An empty folder with a home, and the commands that run in it."""

    def __init__(self, folder: Path, torch: str):
        self.folder, self.torch = folder, torch
        (folder / "home").mkdir()
        kept = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
        # OMP_WAIT_POLICY: beside other programs, threads that spin take each other's time
        given = {"HOME": folder / "home", "TMPDIR": folder, "OMP_WAIT_POLICY": "passive"}
        self.environment = kept | {name: str(value) for name, value in given.items()}
        self.index = ""  # of the packages that were uploaded

    def run(self, *command: object, cwd: Path | None = None, **variables: str) -> str:
        """Run a command, print it and its last line; returns what it printed."""
        words = [str(word) for word in command]
        shown = " ".join(words).replace(str(self.folder), "$TMP")
        print(f"$ {shown}", flush=True)
        start = time.monotonic()
        done = subprocess.run(
            words, cwd=cwd or self.folder, env=self.environment | variables,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        lines = done.stdout.strip().splitlines()
        if done.returncode:
            print(done.stdout)
            raise SystemExit(f"failed with status {done.returncode}: {shown}")
        print(f"    {lines[-1][:120] if lines else ''}  ({time.monotonic() - start:.0f} s)")
        return done.stdout

    def venv(self, name: str) -> Path:
        """A fresh virtual environment; returns its folder of programs."""
        self.run(sys.executable, "-m", "venv", self.folder / name)
        return self.folder / name / "bin"

    def install(self, programs: Path, *arguments: object) -> str:
        return self.run(programs / "pip", "install", "--quiet", *arguments)

    def install_from_index(self, programs: Path, extras: str = "") -> None:
        """The package with extras. torch is named again, so that none brings another."""
        constraints = self.folder / "tree/.ci/constraints.txt"
        self.install(
            programs, "--extra-index-url", self.index, "-c", constraints, self.torch,
            f"{NAME}{extras}",
        )  # fmt: skip


def copy_tree(folder: Path) -> None:
    """The files that git knows or would add, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)


def build(machine: Machine, tools: Path) -> tuple[Path, Path]:
    """Wheel and source distribution, checked; the wheel is built from the source distribution."""
    tree, dist, direct = (machine.folder / name for name in ("tree", "dist", "direct"))
    source = machine.folder / "source"  # setuptools writes into what it builds
    shutil.copytree(tree, source, symlinks=True)
    machine.run(tools / "python", "-m", "build", "--outdir", dist, source)
    machine.run(tools / "python", "-m", "build", "--wheel", "--outdir", direct, source)
    (wheel,), (sdist,), (other,) = dist.glob("*.whl"), dist.glob("*.tar.gz"), direct.glob("*.whl")
    if _contents(wheel) != _contents(other):
        raise SystemExit("the wheel of the source distribution is not the wheel of the tree")
    machine.run(tools / "twine", "check", "--strict", wheel, sdist)
    machine.run(tools / "check-wheel-contents", wheel)
    return wheel, sdist


def _contents(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.CRC for info in archive.infolist()}


@contextlib.contextmanager
def package_index(machine: Machine, tools: Path) -> Iterator[str]:
    """A server of uploaded packages on a free port: PEP 503, and nothing from elsewhere."""
    packages = machine.folder / "packages"
    packages.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [tools / "pypi-server", "run", "-i", "127.0.0.1", "-p", port, "-P", ".", "-a", "."]
    words = [str(word) for word in [*command, "--disable-fallback", packages]]
    server = subprocess.Popen(
        words, env=machine.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/simple/", server)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait()


def _wait_for(url: str, server: subprocess.Popen) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(300):
        if server.poll() is not None:
            raise SystemExit(f"the package index ended with status {server.returncode}")
        with contextlib.suppress(OSError):
            opener.open(url, timeout=5).close()
            return
        time.sleep(0.1)
    raise SystemExit("the package index does not answer")


def install_alone(machine: Machine) -> Path:
    """The package from the local index alone, where only torch is installed; the self-check."""
    programs = machine.venv("base")
    machine.install(programs, machine.torch)
    report = machine.folder / "installed.json"
    machine.install(programs, "--index-url", machine.index, "--report", report, NAME)
    (installed,) = json.loads(report.read_text())["install"]
    source = installed["download_info"]["url"]
    if not source.startswith(machine.index.removesuffix("simple/")):
        raise SystemExit(f"the package came from {source}")
    empty = machine.folder / "empty"
    empty.mkdir()
    machine.run(programs / "python", "-m", "fused_siglip", "--bench", "--report", empty, cwd=empty)
    if not json.loads((empty / "fused_siglip_report.json").read_text())["passed"]:
        raise SystemExit("the self-check did not pass")
    return programs


def other_python(machine: Machine, python: str, number: int) -> None:
    """The wheel in another Python, without torch: that it is allowed there, and compiles."""
    folder = machine.folder / f"python{number}"
    machine.run(python, "-m", "venv", folder)
    programs = folder / "bin"
    machine.install(programs, "--no-deps", "--index-url", machine.index, NAME)
    machine.run(programs / "python", "--version")
    (package,) = folder.glob("lib/*/site-packages/fused_siglip")
    machine.run(programs / "python", "-W", "error", "-m", "compileall", "-q", "-f", package)


def develop(machine: Machine, programs: Path) -> None:
    """The extras for work on the package, an example each: triton, demo, bench, test, dev, docs."""
    machine.install_from_index(programs, "[triton,demo,bench,test,dev,docs]")
    tree, work = machine.folder / "tree", machine.folder / "work"
    for name in (
        "examples",
        "benchmarks",
        "tests",
    ):  # beside the installed package, not in its tree
        shutil.copytree(tree / name, work / name)
    shutil.copy(tree / "pyproject.toml", work)
    python = programs / "python"
    machine.run(python, "-m", "fused_siglip", TRITON_INTERPRET="1")
    machine.run(python, "-m", "examples.emoji", "--quick", "--output-dir", work / "demo", cwd=work)
    output = work / "loss.json"
    machine.run(python, "-m", "benchmarks.suites.loss", "--quick", "--output", output, cwd=work)
    machine.run(python, "-m", "pytest", "-q", "tests/core/test_loss.py", "-k", "diagonal", cwd=work)
    machine.run(programs / "ruff", "check", ".", cwd=tree)
    site = ("mkdocs", "build", "--strict", "--config-file", "docs/site/mkdocs.yml")
    machine.run(python, "-m", *site, cwd=tree, NO_MKDOCS_2_WARNING="1")


def stacks(machine: Machine) -> None:
    """The extras for training stacks, each with the program of its page."""
    programs = machine.venv("stacks")
    machine.install(programs, machine.torch)
    machine.install_from_index(programs, "[open-clip,transformers,sentence-transformers]")
    helper = machine.folder / "helper"
    helper.mkdir()
    shutil.copy(machine.folder / "tree/tests/integrations/torchvision_on_cpu.py", helper)
    for name in STACK_PAGES:
        page = machine.folder / f"tree/docs/integrations/{name}.md"
        (program,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        file = helper / f"page_{name}.py"
        file.write_text(f"import torchvision_on_cpu as t; t.define_schemas()\n{program}")
        machine.run(programs / "python", file, cwd=helper, OMP_NUM_THREADS="1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", default="torch", help="what is installed as torch")
    parser.add_argument("--pythons", nargs="*", default=[], help="interpreters to try as well")
    parser.add_argument("--output", type=Path, help="where to copy the distributions that passed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="release-check-") as name:
        machine = Machine(Path(name).resolve(), options.torch)
        copy_tree(machine.folder / "tree")
        tools = machine.venv("tools")
        machine.install(tools, "-c", machine.folder / "tree/.ci/constraints.txt", *TOOLS)
        wheel, sdist = build(machine, tools)
        with package_index(machine, tools) as url:
            machine.run(tools / "twine", "upload", "--non-interactive", "--disable-progress-bar",
                        "--repository-url", url, "-u", "x", "-p", "x", wheel, sdist)  # fmt: skip
            machine.index = f"{url}simple/"
            for number, python in enumerate(options.pythons):
                other_python(machine, python, number)
            develop(machine, install_alone(machine))
            stacks(machine)
        hub = machine.folder / "hub"
        machine.run(sys.executable, machine.folder / "tree/.ci/kernel_hub/layout.py", hub)
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
            for file in (wheel, sdist):
                shutil.copy(file, options.output)
    print("release-check: all done")


if __name__ == "__main__":
    main()
