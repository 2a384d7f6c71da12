"""Models of other libraries: `fastbb.accelerate`, and `fastbb.heads` for transformers' heads."""
