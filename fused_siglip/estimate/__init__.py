"""What a step in the global batch costs: see cost.py, and ``python -m fused_siglip.estimate``."""
