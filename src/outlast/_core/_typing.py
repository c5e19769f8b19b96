"""Shape annotations: jaxtyping's names where it is installed, else stand-ins that do nothing.

Signatures say ``Float[Tensor, "batch classes"]``. The tests switch jaxtyping's runtime checker on, so a wrong shape in
a signature fails a test; users need neither jaxtyping nor its checker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped, UInt8
else:
    try:
        from jaxtyping import Float, Int, Shaped, UInt8
    except ImportError:

        class _Annotation:
            """``Float[Tensor, "..."]`` is just ``Tensor``."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Float = Int = Shaped = UInt8 = _Annotation

__all__ = ["Float", "Int", "Shaped", "UInt8"]
