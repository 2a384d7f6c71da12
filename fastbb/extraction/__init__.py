"""Extracts features of folders, lists and archives of images; no row is lost or shifted.

sources -> decode -> pipeline -> store; `job` runs them over a whole input.
"""

from .decode import ERROR_KINDS, ImageError, RowError
from .features import Features, open_features
from .job import ErrorBudgetError, Report, extract
from .layout import ExtractionError, OutputError, OutputLockedError, PlanMismatchError
from .pipeline import FeatureBatch, FeatureExtractor
from .sources import InputError

__all__ = [
    "ERROR_KINDS",
    "ErrorBudgetError",
    "ExtractionError",
    "FeatureBatch",
    "FeatureExtractor",
    "Features",
    "ImageError",
    "InputError",
    "OutputError",
    "OutputLockedError",
    "PlanMismatchError",
    "Report",
    "RowError",
    "extract",
    "open_features",
]
