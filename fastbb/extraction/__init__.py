"""Extracts features of folders, lists and archives of images; no row is lost or shifted.

sources -> decode -> pipeline -> store; `job` runs them over a whole input. `features`, `export` and
`verify` read what it stored, by `reading`.
"""

from .decode import ERROR_KINDS, ImageError, RowError
from .export import ExportReport, export_features
from .features import Features, open_features
from .job import extract
from .layout import ExtractionError, OutputError, OutputLockedError, PlanMismatchError
from .pipeline import FeatureBatch, FeatureExtractor
from .ray_workers import RayOptions
from .run import ErrorBudgetError, Report
from .search import Neighbours
from .sources import InputError
from .verify import VerifyReport, verify_features

__all__ = [
    "ERROR_KINDS",
    "ErrorBudgetError",
    "ExportReport",
    "ExtractionError",
    "FeatureBatch",
    "FeatureExtractor",
    "Features",
    "ImageError",
    "InputError",
    "Neighbours",
    "OutputError",
    "OutputLockedError",
    "PlanMismatchError",
    "RayOptions",
    "Report",
    "RowError",
    "VerifyReport",
    "export_features",
    "extract",
    "open_features",
    "verify_features",
]
