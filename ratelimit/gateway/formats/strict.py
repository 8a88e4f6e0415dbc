"""JSON that reads the same here and in an engine. Pure.

Two readers may disagree about a body: which of two equal members counts, what a lone surrogate or a number beyond all
bounds means, how deep is too deep. A body that leaves such a choice is refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import msgspec

from ratelimit.gateway.errors import Rejection, invalid_request

#: The deepest nesting accepted; an engine's own reader gives up at about ten times as much.
MAX_DEPTH = 128

_any_decoder = msgspec.json.Decoder()
_members_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_key_decoder = msgspec.json.Decoder(str)
_NAME = re.compile(rb'\s*[{,]\s*("(?:[^"\\]|\\.)*")\s*:\s*')
_END = re.compile(rb"\s*\}\s*")
_TOO_DEEP = f"The request body is nested deeper than the {MAX_DEPTH} levels accepted here."


def read_members(body: bytes) -> dict[str, msgspec.Raw]:
    """The body's members, each as it is written. Raises ``Rejection`` (400)."""
    try:
        value = _any_decoder.decode(body)
        members = _members_decoder.decode(body)
    except msgspec.ValidationError as error:
        raise invalid_request(f"Invalid request: {error}.") from error
    except RecursionError as error:
        raise invalid_request(_TOO_DEEP) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _not_json(body, error) from error
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _depth_exceeds(value, MAX_DEPTH):
        raise invalid_request(_TOO_DEEP)
    if not _each_once(body, members):
        raise _twice(body)
    return members


def _not_json(body: bytes, error: Exception) -> Rejection:
    if isinstance(error, UnicodeDecodeError):
        return invalid_request("The request body is not valid JSON: it is not UTF-8.")
    if body.startswith(b"\xef\xbb\xbf"):
        return invalid_request("The request body is not valid JSON: it begins with a byte order mark. Leave it out.")
    return invalid_request(f"The request body is not valid JSON: {error}.")


def _depth_exceeds(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return False
    return True


def _each_once(body: bytes, members: dict[str, msgspec.Raw]) -> bool:
    """Whether the body is these members one after the other and nothing else: one that occurs twice comes out once."""
    if len(body) == 1 + sum(len(name) + memoryview(value).nbytes + 4 for name, value in members.items()):
        return True  # written without spaces, as most clients do: there is no room for another member
    at = 0
    for name, value in members.items():
        found = _NAME.match(body, at)
        if found is None or _key_decoder.decode(found[1]) != name:
            return False
        written = bytes(value)
        at = found.end() + len(written)
        if body[found.end() : at] != written:
            return False
    return not members or _END.fullmatch(body, at) is not None


def _twice(body: bytes) -> Rejection:
    pairs: list[tuple[str, Any]] = json.loads(body, object_pairs_hook=list)
    counted = Counter(name for name, _ in pairs)
    name = counted.most_common(1)[0][0][:200]
    return invalid_request(f"'{name}' occurs twice in the request body.", name)
