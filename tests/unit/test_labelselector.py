"""Selectors and names of Kubernetes in a config, as its API takes them."""

from __future__ import annotations

import pytest

from ratelimit.labelselector import dns_label, is_label_value, label_selector


@pytest.mark.parametrize(
    "selector",
    [
        "penstock.io/pool=chat",
        "penstock.io/pool==chat, tier!=canary",
        "penstock.io/pool in (chat,  chat-long),!draining,gpu",
        "app notin (a)",
        "app=",
    ],
)
def test_what_kubectl_takes_is_taken(selector: str) -> None:
    """Equality, sets, presence, and several rules with a comma between them."""
    assert label_selector(selector) == selector


@pytest.mark.parametrize("selector", ["", "a=b,", "a = b = c", "pool in chat", "pool in ()x", "-a=b", "a=b c", "/a=b"])
def test_a_selector_that_the_api_would_refuse_is_refused_at_once(selector: str) -> None:
    """An empty one too: it would take every Service of the namespace for a replica."""
    with pytest.raises(ValueError, match="not a rule of a label selector"):
        label_selector(selector)


def test_names_are_those_of_kubernetes() -> None:
    """Namespaces and ports are DNS labels; a label's value has 63 characters at most."""
    assert dns_label("inference-eu1") == "inference-eu1"
    for wrong in ("Inference", "a_b", "", "-a", "a" * 64):
        with pytest.raises(ValueError, match="not a name in Kubernetes"):
            dns_label(wrong)
    assert is_label_value("h100-llama-3.1-8b")
    assert not is_label_value("h" * 64)
    assert not is_label_value("a/b")
