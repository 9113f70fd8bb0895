"""Kernels that add weighted value logits into base logits (Inverse Value Learning, arXiv 2410.21027).

The package imports with torch alone. Triton is imported when its backend is first used, vLLM never.
"""

from ivl_kernels.checks import check_vocab_map
from ivl_kernels.lm_head_value_add import lm_head_value_add
from ivl_kernels.value_add import value_add

__all__ = ["check_vocab_map", "lm_head_value_add", "value_add"]
