"""The backbone API: configuration, loading, saving, outputs, and the registry of families."""
