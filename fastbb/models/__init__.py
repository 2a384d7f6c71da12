"""The families, each in files that begin with its name. Importing them registers them."""

import pkgutil
from importlib import import_module

for _module in pkgutil.iter_modules(__path__):
    if "_" not in _module.name:  # not the further files of a family
        import_module(f"{__name__}.{_module.name}")
