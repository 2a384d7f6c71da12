"""The Triton side of `ops`: one module per op with its launch configuration, launcher and kernel.

Importing this package imports triton, which the ops do only when they launch.
"""
