"""Small environments of pixels for studies of policies (extra ``rl``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outlast._core._extras import require
from outlast.rl._shifts import ColorShift, DistractorShift, GainShift, TextureShift, VideoBackground

if TYPE_CHECKING:
    from outlast.rl._control import ControlEnv
    from outlast.rl._reach import PixelReach
    from outlast.rl._sac import PixelSAC, SACSettings
    from outlast.rl._stack import FrameStack

__all__ = [
    "ColorShift",
    "ControlEnv",
    "DistractorShift",
    "FrameStack",
    "GainShift",
    "PixelReach",
    "PixelSAC",
    "SACSettings",
    "TextureShift",
    "VideoBackground",
]

# Their base classes are gymnasium's.
_LAZY = {
    "ControlEnv": "outlast.rl._control",
    "FrameStack": "outlast.rl._stack",
    "PixelReach": "outlast.rl._reach",
    "PixelSAC": "outlast.rl._sac",
    "SACSettings": "outlast.rl._sac",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("gymnasium", extra="rl", purpose=f"outlast.rl.{name}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
