"""Every program in docs/integrations.md runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# (section, program) of every python block, in order
SECTIONS = (ROOT / "docs/integrations.md").read_text().split("\n## ")[1:]
PROGRAMS = [
    (section.partition("\n")[0], program)
    for section in SECTIONS
    for program in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
]


@pytest.mark.parametrize("program", [p for _, p in PROGRAMS], ids=[s for s, _ in PROGRAMS])
def test_program_runs(program, tmp_path):
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


def test_every_section_has_one_program():
    assert [name for name, _ in PROGRAMS] == [s.partition("\n")[0] for s in SECTIONS]
