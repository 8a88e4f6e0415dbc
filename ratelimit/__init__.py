"""What each caller may take of what the fleet can serve."""
