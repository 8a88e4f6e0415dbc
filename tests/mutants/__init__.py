"""Broken rules of the limiter, each with the test that must notice: ``python -m tests.mutants``."""
