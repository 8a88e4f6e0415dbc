"""``python -m ratelimit.cli``, for processes that start others without relying on PATH."""

from ratelimit.cli import main

main()
