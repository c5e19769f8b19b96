"""``outlast diagnose padding``: finding the model, reading sizes, printing the audit."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlast._core._extras import require
from outlast.errors import OutlastError, OutlastWarning

if TYPE_CHECKING:
    from outlast.diagnose.padding import PaddingReport, SizeSuggestion


@contextmanager
def one_line_warnings() -> Generator[None]:
    """Our own warnings as one line each on standard error; those of the libraries that build a model are theirs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for text in dict.fromkeys(str(each.message) for each in caught if issubclass(each.category, OutlastWarning)):
        print(f"outlast: {text}", file=sys.stderr)


def read_model(source: str) -> Any:
    """A model by ``torchvision:NAME``, ``timm:NAME`` or ``module:callable``, with random weights.

    Raises:
        ValueError: no such model, or the callable gives none.
        MissingExtraError: torchvision or timm is not installed.
    """
    from torch import nn

    kind, separator, name = source.partition(":")
    if not separator or not name:
        raise ValueError(f"{source!r}: name a model by torchvision:NAME, timm:NAME or module:callable")
    if kind == "torchvision":
        models = require("torchvision.models", extra="vision", purpose="a torchvision model")
        if name not in models.list_models():
            raise ValueError(f"torchvision has no model {name!r}; some: {', '.join(models.list_models()[:6])}")
        settings = {"weights": None} | ({"weights_backbone": None} if name in models.list_models(module=models.detection) else {})
        return models.get_model(name, **settings)
    if kind == "timm":
        timm = require("timm", extra="vision", purpose="a timm model")
        if name not in timm.list_models():
            raise ValueError(f"timm has no model {name!r}; near: {', '.join(timm.list_models(f'*{name[:6]}*')[:6]) or 'none'}")
        return timm.create_model(name, pretrained=False)
    here = str(Path.cwd())
    if here not in sys.path:  # the console script, unlike ``python -m``, does not look in the current folder
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(kind), name)
        model = found if isinstance(found, nn.Module) else found()
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"no model at {source!r}: {error}") from error
    except OutlastError:
        raise
    except Exception as error:  # whatever a user's module does
        raise ValueError(f"no model at {source!r}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{source!r} gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def read_size(text: str) -> tuple[int, ...]:
    """``224`` or ``480x640``.

    Raises:
        ValueError: neither.
    """
    try:
        sizes = tuple(int(part) for part in text.lower().split("x"))
    except ValueError as error:
        raise ValueError(f"--size takes a length or HxW, got {text!r}") from error
    return sizes * 2 if len(sizes) == 1 else sizes


def print_padding(report: PaddingReport, suggestions: Sequence[SizeSuggestion]) -> None:
    """The leaning layers, and sizes near by."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    size = "x".join(map(str, report.input_size[1:]))
    leans = ", ".join(f"{value:+g}" for value in report.grid_skew_px)
    counts = f"{len(report.skewed)} of {len(report.layers)} layers and axes lean"
    console.print(Text(f"input {size}: {counts}; last map off centre by {leans} px (negative: up or left)"))
    if report.skewed:
        table = Table(box=None, pad_edge=False)
        for head in ("layer", "op", "axis", "n", "kernel", "pad", "read", "drop", "lean", "px"):
            table.add_column(head, justify="left" if head in ("layer", "op", "axis") else "right", overflow="fold")
        rows = list(report.skewed)
        while rows:
            row = rows.pop(0)
            axis = row.axis
            if rows and (rows[0].name, rows[0].n, rows[0].skew_input_px) == (row.name, row.n, row.skew_input_px):
                axis = f"{axis[0]}+{rows.pop(0).axis[0]}"  # height and width alike
            pads = (f"{row.pad_left},{row.pad_right}", f"{row.used_left},{row.used_right}")
            window = f"{row.kernel}/{row.stride}"
            table.add_row(row.name, row.op, axis, str(row.n), window, *pads, str(row.dropped), f"{row.skew:+d}", f"{row.skew_input_px:+g}")
        console.print(table)
    for note in report.notes:
        console.print(Text(note))
    for each in suggestions:
        text = "x".join(map(str, each.size))
        rest = "clean" if each.residual_skew == 0.0 else f"leans by {each.residual_skew:g} px over all layers"
        console.print(Text(f"size {text}: {rest}, {each.relative_cost:.2f} of the pixels"))
