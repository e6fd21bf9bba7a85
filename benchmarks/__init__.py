"""Measures speed, memory and accuracy of the loss; README.md describes it. Run from the repository
root, for example ``python -m benchmarks.suites.loss``."""
