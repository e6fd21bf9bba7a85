import os

# Before torch is loaded, and inherited by what tests start: workers and ranks share the cores
# already, and on few or busy cores a second thread each triples the time of small operations.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import collections
import itertools
import sys

import hypothesis
import pytest
import torch

from fused_siglip.kernels import BACKENDS
from support.devices import HAS_GPU, INTERPRETED

# Hypothesis' examples are drawn from the source of a test, not at random: a failure here is a
# failure everywhere. `make test` takes a quarter of them.
for name, divisor in (("full", 1), ("quick", 4)):
    hypothesis.settings.register_profile(
        name,
        max_examples=40 // divisor,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.register_profile(
    "first failure", hypothesis.settings.get_profile("full"), phases=[hypothesis.Phase.generate]
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "full"))

# Beside the tests that take the fixture ``device``, those of files with these names run on a GPU.
ON_THE_GPU = ("test_triton_", "test_alternative")


def needs_triton(item: pytest.Item) -> bool:
    """Whether Triton's kernels run in a test: then Triton's interpreter can run it too."""
    if item.path.name.startswith("test_triton_"):
        return True
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("backend") == "triton"


def values_of(item: pytest.Item) -> list[tuple]:
    """What each ``parametrize`` of a test gives to an item; values are told apart by identity."""
    found = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0]
        names = names.replace(",", " ").split() if isinstance(names, str) else names
        found.append((*names, *(id(item.callspec.params[name]) for name in names)))
    return sorted(found)


def covering(items: list[pytest.Item], strength: int) -> list[pytest.Item]:
    """Some of a test's items, in which any values of so many parameters still meet.

    With a strength of 1 every value of every parameter, with 2 every pair of values. Chosen one by
    one: each time the item with the most that was not there before, and of several such the one
    whose values have been taken least.
    """

    def meetings(item: pytest.Item) -> set:
        values = values_of(item)
        return set(itertools.combinations(values, min(strength, len(values))))

    left, chosen, used = {item: meetings(item) for item in items}, [], collections.Counter()
    while any(left.values()):
        best = max(left, key=lambda i: (len(left[i]), -sum(used[v] for v in values_of(i))))
        chosen.append(best)
        used.update(values_of(best))
        seen = left.pop(best)
        left = {item: found - seen for item, found in left.items()}
    return chosen


def thin_out(items: list[pytest.Item]) -> None:
    """Marks as exhaustive what the marker ``covering(strength)`` lets `make test` leave out."""
    tests: dict[tuple, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("covering"):
            if needs_triton(item) and str(item.callspec.params.get("dtype")) == "torch.float64":
                continue  # skips itself, and covers nothing
            test = (item.parent, item.originalname, needs_triton(item))
            tests.setdefault(test, []).append(item)
    for group in tests.values():
        strength = group[0].get_closest_marker("covering").args[0]
        for item in set(group) - set(covering(group, strength)):
            item.add_marker("exhaustive")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks what runs on a GPU (-m gpu), in Triton's interpreter (-m interpreter), and what only
    `make test-all` runs (-m exhaustive).
    """
    thin_out(items)
    for item in items:
        if "device" in item.fixturenames or item.path.name.startswith(ON_THE_GPU):
            item.add_marker("gpu")
        if needs_triton(item):
            item.add_marker("interpreter")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One worker runs a file whole, for its fixtures; compiling, the longest, is shared.

    With --dist loadfile. The marker xdist_group is no way there: pytest-xdist 3.8 does not hand it
    on with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file.endswith("_compiled.py") else file

    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(autouse=True)
def forget_compiled():
    """Graphs of one test count towards the limit of recompilations of the next, which then fails
    in some orders of the tests only."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def forget_candidates():
    """Backends that a test registers, as a rehearsal of tuning does, are not in the next test's
    self-check."""
    before = set(BACKENDS)
    yield
    for name in BACKENDS.keys() - before:
        del BACKENDS[name]


@pytest.fixture(params=["torch", "triton"])
def backend(request) -> str:
    """Each portable backend: triton on a GPU, or in its interpreter (TRITON_INTERPRET=1)."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if not (HAS_GPU or INTERPRETED):
            pytest.skip("the Triton backend needs a GPU or TRITON_INTERPRET=1")
    return request.param


@pytest.fixture
def device(backend) -> str:
    return "cuda" if HAS_GPU and not INTERPRETED else "cpu"
