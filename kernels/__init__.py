"""Panel kernels: one backend a file, each a class with the interface of :class:`Panel`.

Installed as ``fused_siglip.kernels``. Importing this package imports neither triton nor a device.
"""

from .alignment import aligned_vector
from .interface import (
    GRAD_SCALE,
    Affine,
    Ids,
    Pairs,
    Panel,
    PanelSpec,
    RandomMask,
    RowValues,
    ScoreNormalizer,
    ScoreThreshold,
    accumulate_dtype,
    aligned,
)
from .pair_weights import PairWeights, PositiveShares
from .registry import (
    BACKENDS,
    check_backend,
    default_backend,
    float32_products,
    multiplies_half_into_fp32,
    panel_class,
    why_not_default,
    why_triton_unavailable,
)

__all__ = [
    "BACKENDS",
    "GRAD_SCALE",
    "Affine",
    "Ids",
    "PairWeights",
    "Pairs",
    "Panel",
    "PanelSpec",
    "PositiveShares",
    "RandomMask",
    "RowValues",
    "ScoreNormalizer",
    "ScoreThreshold",
    "accumulate_dtype",
    "aligned",
    "aligned_vector",
    "check_backend",
    "default_backend",
    "float32_products",
    "multiplies_half_into_fp32",
    "panel_class",
    "why_not_default",
    "why_triton_unavailable",
]
