"""A pytest plugin under which transformers cannot be imported: what users without the extra have.

PYTHONPATH=tests/support python -m pytest -p block_transformers tests/backbone ...
"""

import sys

sys.modules["transformers"] = None  # type: ignore[assignment]  # how Python marks "not importable"
