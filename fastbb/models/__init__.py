"""The families, each in files that begin with its name. Importing a family registers it."""

import pkgutil
from importlib import import_module

for _module in pkgutil.iter_modules(__path__):
    if "_" not in _module.name:  # the other files of a family are imported by its first
        import_module(f"{__name__}.{_module.name}")
