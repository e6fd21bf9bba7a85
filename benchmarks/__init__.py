"""Speed, memory and accuracy of the loss, measured; see README.md here. Run from the repository
root, for example ``python -m benchmarks.suites.loss``."""
