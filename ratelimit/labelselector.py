"""The names of Kubernetes that a config holds: label selectors, namespaces, ports. Pure.

The API server refuses a selector that is malformed, but only once it is asked, and each time that it is.
"""

from __future__ import annotations

import re

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_PREFIX = r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?/"
_KEY = rf"(?:{_PREFIX})?{_NAME}"
_VALUE = rf"(?:{_NAME})?"
_RULE = re.compile(
    rf"!?{_KEY}|{_KEY}\s*(?:==?|!=)\s*{_VALUE}|{_KEY}\s+(?:in|notin)\s+\(\s*{_VALUE}(?:\s*,\s*{_VALUE})*\s*\)"
)
_BETWEEN_RULES = re.compile(r",(?![^(]*\))")
_DNS_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_LABEL_VALUE = re.compile(_NAME)


def label_selector(value: str) -> str:
    """A selector as ``kubectl get -l`` takes it; every rule must be fulfilled. Raises ``ValueError``."""
    for rule in _BETWEEN_RULES.split(value):
        if not _RULE.fullmatch(rule.strip()):
            raise ValueError(
                f"{rule.strip()[:60]!r} is not a rule of a label selector; write one such as penstock.io/pool=chat"
            )
    return value


def dns_label(value: str) -> str:
    """A namespace or the name of a port. Raises ``ValueError``."""
    if not _DNS_LABEL.fullmatch(value):
        raise ValueError("is not a name in Kubernetes; use lower-case letters, digits and -")
    return value


def is_label_value(value: str) -> bool:
    """Whether a label can have this value."""
    return _LABEL_VALUE.fullmatch(value) is not None
