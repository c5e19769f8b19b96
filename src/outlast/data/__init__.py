"""Data sets: embedded in the package, in the folder that ``OUTLAST_DATA`` names, or fetched on request."""

from outlast.data._fetch import fetch
from outlast.data._load import ImageSet, load, standardise
from outlast.data._registry import DATASETS, DatasetInfo, data_folder, find, info

__all__ = ["DATASETS", "DatasetInfo", "ImageSet", "data_folder", "fetch", "find", "info", "load", "standardise"]
