"""Fetch the source distributions that hold the peers' own tests, and unpack them under build/.

``python sources.py`` downloads what is missing with pip, checked by its SHA256. Where a download
fails it says so and goes on: the tests of that peer are skipped.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "build" / "peers"
# Of the versions that the Makefile installs. siglip-kernel is not installed, only read.
PINS = {
    "transformers==5.23.0": "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71",
    "siglip-kernel==0.1.2": "3be331a71d1b3aeae19387c495b99fbd111e89f8dbacb5d2060880a93366d659",
}


def fetched_tests(name: str) -> Path:
    """The folder of a peer's tests; where it was not fetched, the module that asks is skipped."""
    (pin,) = (pin for pin in PINS if pin.startswith(f"{name}=="))
    folder = _unpacked(pin) / "tests"
    if not folder.is_dir():
        reason = f"the source of {pin} was not fetched: make test-peers does so from PyPI"
        pytest.skip(reason, allow_module_level=True)
    return folder


def _unpacked(pin: str) -> Path:
    return FOLDER / pin.replace("==", "-").replace("siglip-kernel", "siglip_kernel")


def fetch(pin: str, sha256: str) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        wanted = Path(folder) / "wanted.txt"
        wanted.write_text(f"{pin} --hash=sha256:{sha256}\n")
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        download += ["--disable-pip-version-check", "--no-binary", ":all:", "--require-hashes"]
        subprocess.run([*download, "-r", str(wanted), "-d", folder], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        archive.with_suffix("").with_suffix("").rename(_unpacked(pin))


def main() -> None:
    for pin, sha256 in PINS.items():
        if _unpacked(pin).is_dir():
            continue
        try:
            fetch(pin, sha256)
        except subprocess.CalledProcessError as failure:
            print(
                f"{pin}: not fetched (pip ended with {failure.returncode}); its tests are skipped"
            )


if __name__ == "__main__":
    main()
