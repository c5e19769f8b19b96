"""The studies of the package, and those of users by ``module:NAME``."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from outlast.errors import OutlastError
from outlast.studies._design import Study

# One line a study, in the order in which the demo runs them.
_STUDIES = {
    "sam": "outlast.studies.sam:STUDY",
    "tent": "outlast.studies.tent:STUDY",
    "pad": "outlast.studies.pad:STUDY",
    "intrinsic-dimension": "outlast.studies.intrinsic_dimension:STUDY",
    "gpm": "outlast.studies.gpm:STUDY",
    "gradvac": "outlast.studies.gradvac:STUDY",
    "startup": "outlast.studies.startup:STUDY",
    "distribution-calibration": "outlast.studies.distribution_calibration:STUDY",
    "mixup": "outlast.studies.mixup:STUDY",
    "mixup-theory": "outlast.studies.mixup_theory:STUDY",
    "group-invariance": "outlast.studies.group_invariance:STUDY",
    "performer": "outlast.studies.performer:STUDY",
    "rfa": "outlast.studies.rfa:STUDY",
    "padding": "outlast.studies.padding:STUDY",
    "sample-efficiency": "outlast.studies.sample_efficiency:STUDY",
}


def names() -> tuple[str, ...]:
    """Names of the package's studies."""
    return tuple(_STUDIES)


def names_of(only: Sequence[str]) -> tuple[str, ...]:
    """Names of the package's studies whose theme holds one of these words, or whose name is one; all for no words.

    Raises:
        ValueError: a word that fits none; the message lists the themes.
    """
    themes = {name: get(name).theme for name in _STUDIES}
    for word in only:
        if not any(word.lower() in theme or word == name for name, theme in themes.items()):
            raise ValueError(f"no theme or study {word!r}; the themes: {', '.join(sorted(set(themes.values())))}")
    return tuple(name for name, theme in themes.items() if not only or any(word.lower() in theme or word == name for word in only))


def get(name: str) -> Study:
    """A study by its name, or a user's own by ``module:NAME`` (looked for in the current folder too).

    Raises:
        ValueError: unknown; the message lists the known ones and the nearest.
    """
    if ":" in name:
        return _from_module(name)
    if name not in _STUDIES:
        near = difflib.get_close_matches(name, _STUDIES, n=1)
        hint = f"; did you mean {near[0]!r}" if near else ""
        raise ValueError(f"unknown study {name!r}{hint}. Known: {', '.join(_STUDIES)}. Your own: module:NAME")
    return _from_module(_STUDIES[name])


def _from_module(origin: str) -> Study:
    module_name, _, attribute = origin.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # the console script, unlike ``python -m``, does not look in the current folder
        sys.path.insert(0, here)
    try:
        study = getattr(importlib.import_module(module_name), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"no study at {origin!r}: {error}") from error
    except OutlastError:
        raise
    except Exception as error:  # whatever a user's module does when it is imported
        raise ValueError(f"no study at {origin!r}: {type(error).__name__}: {error}") from error
    if not isinstance(study, Study):
        raise ValueError(f"{origin!r} is a {type(study).__name__}, not a Study")
    return study
