"""Pytest plugin that blocks the import of transformers, as for users without the extra.

PYTHONPATH=tests/support python -m pytest -p block_transformers tests/backbone ...
"""

import sys

sys.modules["transformers"] = None  # type: ignore[assignment]  # how Python marks "not importable"
