"""How a whole backbone runs: eager, compiled, Triton, CUDA graph; choice, checks, explanation."""
