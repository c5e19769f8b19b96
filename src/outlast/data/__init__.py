"""Data sets: embedded in the package, in the folder that ``OUTLAST_DATA`` names, or fetched on request."""

from outlast.data._catalogues import find_catalogues, load_catalogues
from outlast.data._fetch import fetch
from outlast.data._indexed import Indexed
from outlast.data._load import ImageSet, load, standardise
from outlast.data._registry import DATASETS, DatasetInfo, data_folder, find, info
from outlast.data._text import TEXTS, TextInfo, find_encoder, find_text, load_text
from outlast.data._weights import WEIGHTS, WeightsInfo, find_weights, load_weights

__all__ = [
    "DATASETS",
    "TEXTS",
    "WEIGHTS",
    "DatasetInfo",
    "ImageSet",
    "Indexed",
    "TextInfo",
    "WeightsInfo",
    "data_folder",
    "fetch",
    "find",
    "find_catalogues",
    "find_encoder",
    "find_text",
    "find_weights",
    "info",
    "load",
    "load_catalogues",
    "load_text",
    "load_weights",
    "standardise",
]
