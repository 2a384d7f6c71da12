"""Features inside other data libraries: `ray`, `daft` and `datasets`, a module for each.

Each needs the extra of its name: `pip install 'fastbb[ray]'`.
"""
