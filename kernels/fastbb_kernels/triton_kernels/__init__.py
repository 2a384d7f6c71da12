"""The Triton side of `ops`: one module per op with its launch configuration, launcher and kernel.

Importing this package imports triton; the ops import it only when they launch.
"""
