"""Runs whole backbones eager, compiled, by Triton or as CUDA graphs: choice, checks, explanation."""
