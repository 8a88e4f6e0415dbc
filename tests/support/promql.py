"""Which metrics and labels a PromQL expression names. Not a parser: promtool checks the syntax, this finds the names.

An identifier is a label where it stands in braces or in the list of ``by``, ``on`` and their like; a function or an
aggregation where a parenthesis or one of those words follows; else a metric.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_TOKEN = re.compile(
    r"""(?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
    |(?P<range>\[[^\]]*\])
    |(?P<variable>\$\w+)
    |(?P<number>\d[\w.]*)
    |(?P<name>[A-Za-z_:][\w:]*)
    |(?P<sign>=~|!~|!=|[^\s])""",
    re.VERBOSE,
)
_LISTS = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}


class Matcher(NamedTuple):
    """A condition on one label of one metric."""

    metric: str
    label: str
    value: str


class Names(NamedTuple):
    """The metrics of an expression, the conditions on their labels, and the labels of its lists."""

    metrics: frozenset[str]
    matchers: frozenset[Matcher]
    listed: frozenset[str]


def names_in(expression: str) -> Names:
    """The names in an expression; raises ``ValueError`` for braces without a metric before them."""
    tokens = [(found.lastgroup or "", found[0]) for found in _TOKEN.finditer(_without_comments(expression))]
    metrics, matchers, listed = set(), set(), set()
    last_metric, at = "", 0
    while at < len(tokens):
        kind, text = tokens[at]
        following = tokens[at + 1][1] if at + 1 < len(tokens) else ""
        if text in _LISTS and following == "(":
            end = _closing(tokens, at + 1, ")")
            listed |= {name for group, name in tokens[at:end] if group == "name"} - {text}
            at = end
        elif text == "{":
            if not last_metric:
                raise ValueError(f"labels without a metric in {expression!r}")
            end = _closing(tokens, at, "}")
            matchers |= _matchers(last_metric, tokens[at + 1 : end])
            at = end
        elif kind == "name" and following != "(" and text not in _WORDS and following not in _LISTS:
            metrics.add(text)
            last_metric = text
        at += 1
    return Names(frozenset(metrics), frozenset(matchers), frozenset(listed))


def _without_comments(expression: str) -> str:
    return re.sub(r"^\s*#.*$", "", expression, flags=re.MULTILINE)


def _closing(tokens: list[tuple[str, str]], at: int, sign: str) -> int:
    return next(index for index in range(at, len(tokens)) if tokens[index][1] == sign)


def _matchers(metric: str, tokens: list[tuple[str, str]]) -> set[Matcher]:
    triples = zip(tokens, tokens[1:], tokens[2:], strict=False)
    return {
        Matcher(metric, label, value[1:-1])
        for (kind, label), (_, sign), (of, value) in triples
        if kind == "name" and of == "text" and sign in {"=", "=~", "!=", "!~"}
    }
