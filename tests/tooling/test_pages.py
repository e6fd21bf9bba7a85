"""What the documentation says can be run is run, and what it names exists."""

import ast
import importlib
import importlib.util
import math
import re

import pytest
import torch
from torch.nn.functional import normalize

import fused_siglip
from support.pages import ROOT, blocks, pages, run
from support.project import project

# What a page's programs take from the reader's own code.
GIVEN = {
    "README.md": {
        "image_tower": torch.nn.Linear(6, 4),
        "text_tower": torch.nn.Linear(5, 4),
        "images": torch.ones(3, 6),
        "texts": torch.ones(3, 5),
    },
    "docs/negatives.md": {"x": torch.eye(4), "y": torch.eye(4), "t": 10.0, "b": -10.0, "step": 1},
    "docs/distributed.md": {
        "siglip_loss": fused_siglip.siglip_loss,
        "image_features": torch.eye(4),
        "text_features": torch.eye(4),
        "logit_scale": 10.0,
        "logit_bias": -10.0,
    },
    "docs/retrieval.md": {
        **{name: torch.eye(4) for name in ("image_features", "text_features", "x", "y")},
        **{name: torch.arange(4) for name in ("image_ids", "text_ids")},
        "logit_scale": torch.zeros(()),
        "logit_bias": -10.0,
        "log": dict,
    },
}
# tests/integrations/test_snippets.py runs these with the stacks.
ELSEWHERE = sorted(page for page in pages() if page.startswith("docs/integrations/"))
HERE = sorted(set(pages()) - set(ELSEWHERE))


@pytest.mark.parametrize("page", HERE)
def test_programs_run(page):
    assert run(page, **GIVEN.get(page, {}))


def test_the_other_pages_are_those_that_the_stacks_run():
    assert len(ELSEWHERE) == 8
    assert all(len(blocks(ROOT / page)) == 1 for page in ELSEWHERE)


def _sum(x, y, logit, sign=lambda i, j: 1 if i == j else -1, weight=lambda i, j: 1.0):
    """Sum over pairs of -log sigmoid(l z), from the definition: Python's floats, pair by pair."""
    total = 0.0
    for i, image in enumerate(x.tolist()):
        for j, text in enumerate(y.tolist()):
            s = sum(a * b for a, b in zip(image, text, strict=True))
            total += weight(i, j) * math.log1p(math.exp(-sign(i, j) * logit(s)))
    return total


# Each name of the page's table: the definition, of features and the two scalars as they come.
DEFINITIONS = {
    "reference": lambda x, y, t, b: _sum(x, y, lambda s: t * s + b) / len(x),
    "texts_first": lambda x, y, t, b: _sum(y, x, lambda s: t * s + b) / len(y),
    "mean_of_all": lambda x, y, t, b: _sum(x, y, lambda s: t * s + b) / len(x) ** 2,
    "mean_and_again": lambda x, y, t, b: _sum(x, y, lambda s: t * s + b) / len(x) ** 3,
    "labels_0_1": lambda x, y, t, b: _sum(x, y, lambda s: t * s + b),
    "bias_subtracted": lambda x, y, t, b: _sum(x, y, lambda s: t * s - b) / len(x),
    "bias_inside": lambda x, y, t, b: _sum(x, y, lambda s: t * (s + b)) / len(x),
    "temperature_divides": lambda x, y, tau, b: _sum(x, y, lambda s: s / tau + b) / len(x),
    "log_temperature": lambda x, y, t, b: _sum(x, y, lambda s: math.exp(t) * s + b) / len(x),
    "normalizes_inside": lambda x, y, t, b: (
        _sum(*(v / v.square().sum(1, keepdim=True).sqrt() for v in (x, y)), lambda s: t * s + b)
        / len(x)
    ),
    "both_directions": lambda x, y, t, b: (
        (_sum(x, y, lambda s: t * s + b) + _sum(y, x, lambda s: t * s + b)) / (2 * len(x))
    ),
    "classes_balanced": lambda x, y, t, b: _sum(
        x, y, lambda s: t * s + b,
        weight=lambda i, j: 1 / len(x) if i == j else 1 / (len(x) * (len(x) - 1)),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def which_loss():
    return run("docs/which_loss.md")


def test_every_line_of_the_table_is_defined(which_loss):
    text = (ROOT / "docs/which_loss.md").read_text()
    named = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert named == [theirs.__name__ for theirs in which_loss["CALLS"]] == list(DEFINITIONS)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_implementation_and_call_are_the_definition(which_loss, name):
    ((theirs, ours),) = ((f, g) for f, g in which_loss["CALLS"].items() if f.__name__ == name)
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(9, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    if name != "normalizes_inside":
        x, y = normalize(x), normalize(y)
    t, b = torch.tensor(1.7, dtype=torch.float64), torch.tensor(-0.9, dtype=torch.float64)
    exact = DEFINITIONS[name](x, y, t.item(), b.item())
    assert theirs(x, y, t, b).item() == pytest.approx(exact, rel=1e-12)
    assert ours(x, y, t, b).item() == pytest.approx(exact, rel=1e-12)


def test_open_clips_own_class_is_the_reference(which_loss):
    pytest.importorskip("tqdm")
    from benchmarks.common.baselines import open_clip_loss_module

    x, y = (normalize(torch.randn(9, 5, dtype=torch.float64)) for _ in range(2))
    theirs = open_clip_loss_module().SigLipLoss()(x, y, 1.7, -0.9)
    assert theirs.item() == pytest.approx(DEFINITIONS["reference"](x, y, 1.7, -0.9), rel=1e-12)


class Tower(torch.nn.Module):
    """With dropout, which must drop the same in both passes."""

    def __init__(self, width):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(width, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 8)
        )
        self.seen = []

    def forward(self, rows):
        features = self.layers(rows)
        self.seen.append((torch.is_grad_enabled(), features.detach()))
        return features


@pytest.fixture(scope="module")
def large_batches():
    return run("docs/large_batches.md")


@pytest.mark.parametrize("rows, chunk", [(64, 64), (64, 16), (50, 16), (5, 1)])
def test_gradcache_is_the_whole_batch(large_batches, rows, chunk):
    torch.manual_seed(1)
    towers = [Tower(6).double(), Tower(7).double()]
    criterion = fused_siglip.LearnableSigLipLoss().double()
    parameters = [p for module in (*towers, criterion) for p in module.parameters()]
    batches = torch.randn(rows, 6).double(), torch.randn(rows, 7).double()

    # one graph of all chunks, which draws the same masks
    torch.manual_seed(2)
    features = [
        torch.cat([normalize(tower(part), dim=-1) for part in batch.split(chunk)])
        for tower, batch in zip(towers, batches, strict=True)
    ]
    whole = criterion(*features)
    expected = torch.autograd.grad(whole, parameters)
    for tower in towers:
        tower.seen.clear()

    torch.manual_seed(2)
    loss = large_batches["gradcache_step"](towers, batches, criterion, chunk)
    torch.testing.assert_close(loss, whole.detach())
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    for tower in towers:
        chunks = len(tower.seen) // 2
        assert [grad for grad, _ in tower.seen] == [False] * chunks + [True] * chunks
        assert chunks == math.ceil(rows / chunk)
        first, again = tower.seen[:chunks], tower.seen[chunks:]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, again, strict=True))


def test_table_of_priors():
    rows = re.findall(
        r"^\| (\d+) \| -(\d+\.\d) \|$", (ROOT / "docs/scale_and_bias.md").read_text(), re.MULTILINE
    )
    assert len(rows) == 5
    for batch, prior in rows:
        assert float(prior) == round(math.log(int(batch) - 1), 1)


PUBLIC = ("fused_siglip", "fused_siglip.testing", "fused_siglip.kernels")
WITHOUT_ALL = ("fused_siglip.estimate.cost", "fused_siglip.testing.rounding")


def public_names() -> set[str]:
    """What a module lists in __all__, and of those without one, what it defines without a _."""
    names = set()
    for module in map(importlib.import_module, PUBLIC):
        names |= {f"{module.__name__}.{name}" for name in module.__all__}
    files = {name: ROOT / f"{name.replace('.', '/')}.py" for name in WITHOUT_ALL}
    for file in (ROOT / "fused_siglip/integrations").glob("[a-z]*.py"):
        files[f"fused_siglip.integrations.{file.stem}"] = file  # read: a stack may be missing
    for module, file in files.items():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                names.add(f"{module}.{node.name}")
    return names


def documented() -> set[str]:
    """Names that the reference's pages take from the docstrings."""
    names = set()
    for page in (ROOT / "docs/reference").glob("*.md"):
        for match in re.finditer(r"^::: ([\w.]+)\n((?:    .*\n)*)", page.read_text(), re.MULTILINE):
            members = re.search(r"members: \[(.*)\]", match[2])
            listed = members[1].split(", ") if members else []
            names |= {f"{match[1]}.{member}" for member in listed} or {match[1]}
    return names


def test_every_public_name_is_in_the_reference():
    assert (
        len(public_names()) > 30 and "fused_siglip.integrations.open_clip.patch" in public_names()
    )
    assert public_names() - documented() == set()


def test_the_reference_names_nothing_that_is_gone():
    for name in documented():
        module, _, attribute = name.rpartition(".")
        if ".integrations." not in name:  # their stacks are not installed here
            assert hasattr(importlib.import_module(module), attribute), name


def texts() -> dict[str, str]:
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks/README.md"]
    return {file.name: file.read_text() for file in files}


def test_targets_of_make_that_pages_name_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets |= {t for line in re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.M)
                for t in line.split()}  # fmt: skip
    named = set()
    for text in texts().values():
        named |= set(re.findall(r"(?:`|^    )make ([a-z][\w-]*)", text, re.MULTILINE))
    assert len(named) > 10 and named - targets == set()


def test_modules_that_pages_run_exist():
    named = set()
    for text in texts().values():
        named |= set(re.findall(r"python -m ((?:fused_siglip|benchmarks|examples)[\w.]*)", text))
    assert len(named) > 8
    missing = {name for name in named if importlib.util.find_spec(name.rstrip(".")) is None}
    assert missing == set()


def test_extras_that_pages_install_exist():
    extras = set(project()["optional-dependencies"])
    named = set()
    for text in texts().values():
        for group in re.findall(r"(?:fused-siglip|\"?\.)\[([a-z][\w,-]*)\]", text):
            named |= set(group.split(","))
    assert {"transformers", "demo"} <= named and named - extras == set()
