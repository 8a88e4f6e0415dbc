"""Images, sounds and videos in a prompt: they come with the request, and an image holds a constant. Pure.

An engine would fetch a URL from where it stands, inside the operator's network, and nothing of what it found there
would be counted. So only ``data:`` URLs pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from ratelimit.gateway.errors import invalid_request

#: What one image holds of the prompt until the engine reports its length: an image of about 1.1 megapixels, to which
#: most models scale down. Its bytes say little: they are compressed.
IMAGE_TOKENS = 1_600

_DATA_URL = "data:"
_LINKS = ("image_url", "audio_url", "video_url", "file_url")
#: A message without any of these has no media; an escape might spell one.
_MAY_HAVE_MEDIA = re.compile(rb'_url"|"source"|\\u')
_decoder = msgspec.json.Decoder()


class Images(msgspec.Struct, frozen=True):
    """How many images a prompt has, and the bytes that they take in the request."""

    count: int = 0
    size: int = 0


def images_of(messages: Iterable[msgspec.Raw]) -> Images:
    """The images of messages or input items.

    Raises ``Rejection`` (400) for media that an engine would have to fetch.
    """
    sizes = [
        size
        for message in messages
        if _MAY_HAVE_MEDIA.search(message)
        for part in _parts(_decoder.decode(message))
        for size in _image_sizes(part)
    ]
    return Images(len(sizes), sum(sizes)) if sizes else Images()


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """A message and the parts of its content; what tools are called with is text to an engine, and not looked at."""
    if type(value) is not dict:
        return
    yield value
    for name in ("content", "output"):
        inner = value.get(name)
        for part in inner if type(inner) is list else (inner,):
            yield from _parts(part)


def _image_sizes(part: dict[str, Any]) -> Iterator[int]:
    for name in _LINKS:
        link = part.get(name)
        url = link.get("url") if type(link) is dict else link
        if type(url) is str:
            _check_carried(url, name)
            if name == "image_url":
                yield len(url)
    source = part.get("source")
    if type(source) is not dict:
        return
    if type(url := source.get("url")) is str:
        _check_carried(url, "source")
    if part.get("type") == "image":
        data = source.get("data", source.get("url"))
        yield len(data) if type(data) is str else 0


def _check_carried(url: str, param: str) -> None:
    if not url.startswith(_DATA_URL):
        told = f"'{param}' refers to a URL, which is not fetched here. Send the content itself, as a 'data:' URL"
        raise invalid_request(f"{told} or as a source of type 'base64'.", param)
