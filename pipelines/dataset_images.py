"""Images of a data set: their size from the header, and the PNG or JPEG that is stored.

A RowProblem raised here has no key: the caller knows the column.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .sources import RowProblem

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[np.uint8]
Size = tuple[int, int]
"""Height and width."""

_GRAY = {"1", "L", "LA", "La"}
_COLOUR = {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
# What Pillow raises for damaged files, besides OSError.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


def look(image: bytes | Pixels) -> tuple[Size, int]:
    """Size and channels (1 or 3) of an image, from its header alone.

    Raises
    ------
    RowProblem
        It is no image that Pillow knows, or its pixels have more than 8 bits.
    """
    if isinstance(image, np.ndarray):
        return (image.shape[0], image.shape[1]), 1 if image.ndim == 2 else 3
    from PIL import Image

    try:
        with Image.open(io.BytesIO(image)) as found:
            mode, (width, height) = found.mode, found.size
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise RowProblem("", f"expected a readable image; found {error}.") from error
    if mode not in _GRAY | _COLOUR:
        raise RowProblem(
            "", f"expected 8 bits a channel; found Pillow's mode {mode}. Convert it first."
        )
    return (height, width), 1 if mode in _GRAY else 3


def stored(image: bytes | Pixels, size: Size) -> bytes:
    """The image as PNG or JPEG of that size: as it is where it is so already.

    Another size is resized (bilinear, antialiased), another format becomes PNG, both as 8-bit
    gray or RGB.

    Raises
    ------
    RowProblem
        The image cannot be decoded to its end.
    """
    from PIL import Image

    if isinstance(image, np.ndarray):
        return _png(Image.fromarray(image), size)
    try:
        with Image.open(io.BytesIO(image)) as found:
            found.load()
            if found.format in ("PNG", "JPEG") and found.size == (size[1], size[0]):
                return image
            return _png(found.convert("L" if found.mode in _GRAY else "RGB"), size)
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise RowProblem("", f"expected a whole image; found {error}.") from error


def _png(image: Image.Image, size: Size) -> bytes:
    from PIL import Image

    height, width = size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
