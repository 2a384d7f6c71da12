"""Runs whole backbones: eager, compiled, by Triton, as CUDA graphs; choice, checks, explanation."""
