"""Studies: one file a paper, each the experiment behind a claim, and the engine that runs them.

``docs/studies.md`` writes a new one from an example.
"""

from outlast.studies._design import (
    Arm,
    Claim,
    Figure,
    Metric,
    Outcome,
    Part,
    Scale,
    Setting,
    Settings,
    Study,
)
from outlast.studies._registry import get, names
from outlast.studies._results import Results

__all__ = [
    "Arm",
    "Claim",
    "Figure",
    "Metric",
    "Outcome",
    "Part",
    "Results",
    "Scale",
    "Setting",
    "Settings",
    "Study",
    "get",
    "names",
]
