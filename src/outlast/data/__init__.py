"""Data sets: embedded in the package, in the folder that ``OUTLAST_DATA`` names, or fetched on request."""

from outlast.data._catalogues import find_catalogues, load_catalogues
from outlast.data._fetch import fetch
from outlast.data._indexed import Indexed
from outlast.data._load import ImageSet, load, standardise
from outlast.data._registry import DATASETS, DatasetInfo, data_folder, find, info
from outlast.data._weights import WEIGHTS, WeightsInfo, find_weights, load_weights

__all__ = [
    "DATASETS",
    "WEIGHTS",
    "DatasetInfo",
    "ImageSet",
    "Indexed",
    "WeightsInfo",
    "data_folder",
    "fetch",
    "find",
    "find_catalogues",
    "find_weights",
    "info",
    "load",
    "load_catalogues",
    "load_weights",
    "standardise",
]
