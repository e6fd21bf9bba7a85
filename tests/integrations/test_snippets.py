"""Every program in docs/integrations/ runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs/integrations").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_program_runs(page, tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    file = tmp_path / "program.py"
    # torchvision's operators first, as in conftest.py: only where torch is a CPU build
    file.write_text(f"import torchvision_on_cpu; torchvision_on_cpu.define_schemas()\n{program}")
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(file)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip(), "the program shows nothing"


def test_every_page_is_in_the_table():
    table = (ROOT / "docs/integrations.md").read_text()
    assert {page.stem for page in PAGES} == set(re.findall(r"\(integrations/(\w+)\.md\)", table))
