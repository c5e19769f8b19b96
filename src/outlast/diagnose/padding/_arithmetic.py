"""Where the windows of a layer lie on one axis: exact integers, no model."""

from __future__ import annotations

from typing import NamedTuple


class Window(NamedTuple):
    """What a sliding window does on one axis.

    Attributes:
        out: output length.
        used_left: padding columns that are read on the left (or top).
        used_right: on the right (or bottom).
        dropped: real columns that no window reads.
        skew: twice the distance from the centre of the input to the centre of the windows, in pixels of the input; 0 is mirror
            symmetric, negative leans left (or up).
    """

    out: int
    used_left: int
    used_right: int
    dropped: int
    skew: int


def window(n: int, kernel: int, stride: int, dilation: int, pad_left: int, pad_right: int, *, ceil_mode: bool = False) -> Window:
    """Convolution and pooling (section 3.1 of the method's derivation; ``ceil_mode`` by PyTorch's rule).

    Negative padding is a crop.

    Raises:
        ValueError: no window fits.
    """
    extent = dilation * (kernel - 1) + 1
    room = n + pad_left + pad_right - extent
    if room < 0:
        raise ValueError(f"a window of extent {extent} does not fit into {n} pixels with padding {pad_left} and {pad_right}")
    rest = room % stride
    out = room // stride + 1
    if ceil_mode and rest:
        out += 1
        if (out - 1) * stride >= n + pad_left:  # the last window would start in the right padding
            out -= 1
        else:
            over = stride - rest
            return Window(out, pad_left, pad_right + over, 0, pad_right - pad_left + over)
    unread_padding = min(rest, max(pad_right, 0))
    return Window(out, pad_left, pad_right - unread_padding, min(rest - unread_padding, n), pad_right - pad_left - rest)


def transposed(n: int, kernel: int, stride: int, dilation: int, pad: int, output_padding: int) -> Window:
    """Transposed convolution; its skew is in pixels of the output."""
    extent = dilation * (kernel - 1) + 1
    out = (n - 1) * stride - 2 * pad + extent + output_padding
    return Window(out, pad, pad - output_padding, 0, output_padding)
