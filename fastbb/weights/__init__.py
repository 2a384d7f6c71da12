"""Tensors computed from weights, and detection of changed weights and settings."""
