"""What if: a fleet, a policy and a demand on paper → the limits that follow, and who is throttled by how much."""
