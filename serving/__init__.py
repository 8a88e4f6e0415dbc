"""What the fleet can serve. Knows nothing of tiers, keys or Redis."""
