"""Load that proves the limits: schedules, predictions, scenarios and their reports."""
