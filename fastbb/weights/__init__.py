"""Tensors computed from weights, and what notices that weights or settings changed."""
