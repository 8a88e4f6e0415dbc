"""JSON that reads the same here and in an engine. Pure.

Two readers may disagree about a body: which of two equal members counts, what a lone surrogate or a number beyond all
bounds means, how deep is too deep. A body that leaves such a choice is refused, and so is one of so many parts that it
would take long to read: all other callers wait meanwhile.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from ratelimit.gateway.errors import Rejection, invalid_request

#: The deepest nesting accepted; an engine's own reader gives up at about ten times as much.
MAX_DEPTH = 128
#: The most lists, objects, and elements and members after their first.
MAX_PARTS = 100_000
#: The same where token ids are taken, which are short numbers.
MAX_PARTS_WITH_TOKEN_IDS = 1_000_000
#: The longest name of a member of the body itself; none that is served comes near it.
_MAX_NAME_CHARACTERS = 1000
#: The most members of the body itself, for the same reason.
_MAX_MEMBERS = 1000

_any_decoder = msgspec.json.Decoder()
_members_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_key_decoder = msgspec.json.Decoder(str)
# Possessive: what matched is never tried otherwise, for which every character would be remembered.
_NAME = re.compile(rb'\s*+[{,]\s*+("[^"\\]*+(?:\\.[^"\\]*+)*+")\s*+:\s*+')
_END = re.compile(rb"\s*+\}\s*+")
_TOO_DEEP = f"The request body is nested deeper than the {MAX_DEPTH} levels accepted here."


def read_members(body: bytes, max_parts: int = MAX_PARTS) -> dict[str, msgspec.Raw]:
    """The body's members, each as it is written. Raises ``Rejection`` (400)."""
    if _parts_exceed(body, max_parts):
        raise invalid_request(f"The request body has more than the {max_parts} elements and members accepted here.")
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
    if len(members) > _MAX_MEMBERS:
        raise invalid_request(f"The request body has more than the {_MAX_MEMBERS} members of its own accepted here.")
    if any(len(name) > _MAX_NAME_CHARACTERS for name in members):
        raise invalid_request(f"A member's name is longer than the {_MAX_NAME_CHARACTERS} characters accepted here.")
    again = _repeated(body, members)
    if again is not None:
        raise invalid_request(f"'{again[:200]}' occurs twice in the request body.", again[:200])
    return members


def _parts_exceed(body: bytes, most: int) -> bool:
    """Whether a body has more parts than this, however they are nested; what stands in strings is none."""
    if _marks(body) <= most:
        return False
    # No text can hide a part: strings are told apart by their quotes, and those within them are escaped.
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if plain.count(b'"') > 4 * (most + 1):  # at most two strings a part, a name and a value
        return True
    return _marks(b"".join(plain.split(b'"')[::2])) > most


def _marks(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{") + text.count(b",")


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


def _repeated(body: bytes, members: dict[str, msgspec.Raw]) -> str | None:
    """A name that occurs twice. Where none does, the body is its members one after the other and nothing else.

    Of two equal members the first tells the place in the order, and the last the value.
    """
    if len(body) == 1 + sum(len(name) + memoryview(value).nbytes + 4 for name, value in members.items()):
        return None  # written without spaces, as most clients do: there is no room for another member
    at = 0
    last = ""
    for name, value in members.items():
        found = _NAME.match(body, at)
        if found is None:
            return last  # its value goes on: it was another number than that which came out
        if (read := _key_decoder.decode(found[1])) != name:
            return read
        written = bytes(value)
        at = found.end() + len(written)
        if body[found.end() : at] != written:
            return name
        last = name
    if not members or _END.fullmatch(body, at):
        return None
    found = _NAME.match(body, at)
    return last if found is None else _key_decoder.decode(found[1])
