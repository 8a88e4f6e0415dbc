"""A publication answers who may use what."""

from __future__ import annotations

import pytest

from ratelimit.policy import OrgPolicy
from ratelimit.publication import Publication


@pytest.mark.parametrize(
    ("org", "model", "allowed"),
    [("all", "any", True), ("some", "a", True), ("some", "b", False), ("none", "a", False), ("removed", "a", False)],
)
def test_only_published_orgs_are_allowed(org: str, model: str, allowed: bool) -> None:
    """An org uses every model or those listed for it, and one that is not published uses none."""
    orgs = (OrgPolicy("all"), OrgPolicy("some", ("a",)), OrgPolicy("none", ()))
    publication = Publication(1, "now", "test", enforce=True, pools=(), tiers=(), orgs=orgs)
    assert publication.allows(org, model) is allowed
