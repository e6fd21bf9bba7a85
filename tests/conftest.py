import pytest

from support.devices import HAS_GPU, INTERPRETED

# Beside the tests that take the fixture ``device``, those of files with these names run on a GPU.
ON_THE_GPU = ("test_triton_", "test_alternative")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Of two workers one runs a file whole, for its fixtures; compiling, the longest, is shared.

    Marks what a GPU runs: -m gpu leaves out what would only load the CPU beside it.
    """
    for item in items:
        if "device" in item.fixturenames or item.path.name.startswith(ON_THE_GPU):
            item.add_marker("gpu")
    if config.getoption("loadgroup", False):
        for item in items:
            if not item.path.name.endswith("_compiled.py"):
                item.add_marker(pytest.mark.xdist_group(item.path.name))


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
