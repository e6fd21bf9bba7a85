"""The claims of arXiv 2303.15343 on one machine: small data, small towers, minutes."""
