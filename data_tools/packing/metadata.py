"""What files that Pillow does not open are, and image files without what is not pixels.

The latter is for those whose EXIF, XMP, comments or colour profile are broken.
"""

import struct

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_WEBP_METADATA = {b"EXIF", b"XMP ", b"ICCP"}
# JPEG segments: all APPn but JFIF's and Adobe's, which say what the colours are, and comments.
_JPEG_METADATA = {*range(0xE1, 0xEE), 0xEF, 0xFE}


# What a file may be that is no image Pillow opens, by how it begins.
_OTHERS = {
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"%PDF": "PDF",
    b"%!PS": "PostScript",
    b"<svg": "SVG",
    b"<?xml": "XML, perhaps SVG",
}
_PAGES = (b"<!doctype", b"<html")
_IMAGES = (_PNG, b"\xff\xd8", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def unread_format(data: bytes) -> str:
    """What a file is in which Pillow sees no image, as a reason to leave it out."""
    start = data[:64].lstrip()
    if data[4:8] == b"ftyp":
        kind = {b"avif": "AVIF", b"avis": "AVIF"}.get(data[8:12], "HEIF (HEIC) or a video")
    else:
        kind = next((kind for begin, kind in _OTHERS.items() if start.startswith(begin)), "")
    if kind:
        return f"it is {kind}, which is not read: convert it first"
    if start.lower().startswith(_PAGES):
        return "it is a web page: the download failed"
    if data.startswith(_IMAGES):
        return "its header is damaged, or of a kind that Pillow does not read"
    return "it begins as no image does"


def without_metadata(data: bytes) -> bytes | None:
    """The same pixels in a file of a PNG, JPEG or WebP without metadata; None for other files and broken ones."""
    try:
        if data.startswith(_PNG):
            return _png(data)
        if data.startswith(b"\xff\xd8"):
            return _jpeg(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
    except struct.error:  # the file ends within a header
        pass
    return None


def _png(data: bytes) -> bytes:
    """Source: PNG specification, W3C, 5.3: chunks of length, type, data, CRC."""
    kept, at = [data[:8]], 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if data[at + 4 : at + 8] in _PNG_PIXELS:
            kept.append(data[at : at + 12 + length])
        at += 12 + length
    return b"".join(kept)


def _jpeg(data: bytes) -> bytes:
    """Source: ITU-T T.81, B.1.1: markers 0xFF nn, most with a length that counts itself; pixels follow SOS."""
    kept, at = [data[:2]], 2
    while True:
        mark, kind, length = struct.unpack_from(">BBH", data, at)
        if mark != 0xFF or kind == 0xDA:
            return b"".join([*kept, data[at:]])
        if kind not in _JPEG_METADATA:
            kept.append(data[at : at + 2 + length])
        at += 2 + length


def _webp(data: bytes) -> bytes:
    """Source: RFC 9649, 2.3 to 2.7: RIFF chunks padded to even sizes; the first, VP8X, has flags for the others."""
    kept, at = [], 12
    while at < len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        chunk = bytearray(data[at : at + 8 + length + length % 2])
        if kind == b"VP8X":
            chunk[8] &= ~0b00101100  # colour profile, EXIF, XMP
        if kind not in _WEBP_METADATA:
            kept.append(bytes(chunk))
        at += 8 + length + length % 2
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body
