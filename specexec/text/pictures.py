"""Image files as they come with a message: read from data: URLs or from disk, with limits. Nothing is fetched.

Their senders may be hostile: a file that is damaged, huge, or no image at all is refused in words.
"""

from __future__ import annotations

import base64
import binascii
import io
import struct
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from specexec.errors import BadMessages

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MOST_B = 20 << 20  # of a file
MOST_PIXELS = 50_000_000  # before a model's own processor makes it smaller
KINDS = ("image_url", "input_image", "image")
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError, struct.error, zlib.error)


def is_picture(part: object) -> bool:
    """Whether a part of a message's content is an image, in OpenAI's shapes."""
    return isinstance(part, Mapping) and part.get("type") in KINDS


def picture_part(url: str) -> dict[str, object]:
    """An image as a part of a message's content."""
    return {"type": "image_url", "image_url": {"url": url}}


def picture_in(part: Mapping[str, object], at: str) -> bytes:
    """The file in a part of a message: {"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}.

    Raises BadMessages that begins with `at` for what is no data: URL.
    """
    given = part.get("image_url", part.get("url"))
    url = given.get("url") if isinstance(given, Mapping) else given
    if not isinstance(url, str):
        raise BadMessages(f"{at}: an image needs an image_url with a url.", hint="data:image/png;base64,…")
    scheme, colon, rest = url.partition(":")
    if not colon or scheme.lower() != "data":
        shown = url if len(url) <= 60 else f"{url[:60]}…"
        raise BadMessages(
            f"{at}: {shown} is no data: URL, and images are not fetched.",
            hint="send the file itself: data:image/png;base64,…",
        )
    settings, comma, content = rest.partition(",")
    if not comma or not settings.lower().endswith(";base64"):
        raise BadMessages(f"{at}: the data: URL of an image must be in base64.", hint="data:image/png;base64,…")
    if len(content) > MOST_B // 3 * 4 + 4:
        raise _large(at, len(content) * 3 // 4)
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as problem:
        raise BadMessages(f"{at}: the image's data: URL is damaged ({problem}).") from problem


def data_url(file: Path) -> str:
    """An image file as a data: URL, looked at first. Raises BadMessages for what cannot be read or is no image."""
    try:
        size_B = file.stat().st_size
        if size_B > MOST_B:
            raise _large(str(file), size_B)
        with file.open("rb") as reading:
            content = reading.read(MOST_B + 1)  # a device says that it has no bytes, and never ends
    except (OSError, ValueError) as problem:  # ValueError: a name that no file can have
        reason = problem.strerror if isinstance(problem, OSError) else problem
        raise BadMessages(f"{str(file)!r} cannot be read: {reason}.", hint="check the path.") from problem
    kind = opened(content, str(file)).get_format_mimetype() or "image/png"  # type: ignore[attr-defined]  # of files
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def is_image_file(file: Path) -> bool:
    """Whether a file begins as images do. Raises OSError."""
    with file.open("rb") as reading:
        begins = reading.read(12)
    if begins.startswith(b"BM"):  # as words may
        return begins[6:10] == bytes(4)
    return begins.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8")) or begins[:4] + begins[8:] == b"RIFFWEBP"


def opened(content: bytes, at: str) -> Image:
    """The picture in a file: its header is read and checked, not yet its pixels. Raises BadMessages."""
    from PIL import Image, UnidentifiedImageError

    if len(content) > MOST_B:
        raise _large(at, len(content))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size, which is checked below
            found = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as problem:
        raise BadMessages(f"{at}: this is no image that can be read.", hint=f"{', '.join(FORMATS)}.") from problem
    except Image.DecompressionBombError as problem:
        raise _many_pixels(at) from problem
    except DAMAGE as problem:
        raise _damaged(at, problem) from problem
    if found.width * found.height > MOST_PIXELS:
        raise _many_pixels(at)
    return found


def pixels(content: bytes, at: str) -> Image:
    """The picture in colours and upright, as transformers reads image files. Raises BadMessages."""
    from PIL import ImageOps

    found = opened(content, at)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.load()
            return ImageOps.exif_transpose(found).convert("RGB")
    except DAMAGE as problem:
        raise _damaged(at, problem) from problem


def _large(at: str, size_B: int) -> BadMessages:
    return BadMessages(
        f"{at}: the image has {size_B:,} bytes; {MOST_B:,} are allowed.", hint="a smaller image, or JPEG."
    )


def _many_pixels(at: str) -> BadMessages:
    return BadMessages(f"{at}: the image has more than {MOST_PIXELS:,} pixels.", hint="a smaller image.")


def _damaged(at: str, problem: Exception) -> BadMessages:
    return BadMessages(f"{at}: the image is damaged ({str(problem).rstrip('.') or type(problem).__name__}).")
