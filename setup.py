import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "fused_siglip/__init__.py").read_text(), re.MULTILINE
).group(1)

EXTRAS = {
    "test": [
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "coverage",
        "numpy",
        "build",
        "setuptools",
    ],
    "bench": ["numpy", "tqdm", "matplotlib"],
    "demo": ["numpy", "tqdm", "matplotlib", "scikit-learn", "scipy"],
    "triton": ["triton>=3.6"],
}
# What each integration was tried with. Its own file says the same.
STACKS = {
    "open-clip": ["open_clip_torch>=3.0,<5"],
    "transformers": ["transformers>=5.4,<6"],
    "sentence-transformers": ["sentence-transformers[train]>=6.0,<7"],
}
EXTRAS["dev"] = sorted({name for extra in EXTRAS.values() for name in extra} | {"mypy", "ruff"})
# Beside dev, not in it: the site is built without importing the package (make docs).
EXTRAS["docs"] = ["mkdocs-material", "mkdocstrings-python", "ruff"]

setup(
    name="fused-siglip",
    version=VERSION,
    description="Sigmoid contrastive loss (SigLIP): exact gradients in one sweep, no logit matrix",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        "fused_siglip",
        "fused_siglip.distributed",
        "fused_siglip.estimate",
        "fused_siglip.integrations",
        "fused_siglip.kernels",  # a link to kernels/
        "fused_siglip.selection",
        "fused_siglip.testing",
    ],
    package_data={"fused_siglip": ["py.typed"]},
    install_requires=["torch>=2.10"],
    extras_require=EXTRAS | STACKS,
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
