"""Kernels that add weighted value logits into base logits."""
