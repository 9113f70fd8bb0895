"""Kernels that add weighted value logits into base logits, and solve the weights (arXiv 2410.21027, 2406.15480).

The package imports with torch alone. Triton is imported when its backend is first used; numba, where it is installed,
when torch's is, on a CPU; vLLM never.
"""

from ivl_kernels.checks import check_vocab_map
from ivl_kernels.fusion import Solution, fusion_weights, joint_fusion_weights, trust_region_weights
from ivl_kernels.lm_head_value_add import lm_head_value_add
from ivl_kernels.value_add import value_add

__all__ = [
    "Solution",
    "check_vocab_map",
    "fusion_weights",
    "joint_fusion_weights",
    "lm_head_value_add",
    "trust_region_weights",
    "value_add",
]
