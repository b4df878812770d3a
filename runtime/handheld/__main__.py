"""``python -m handheld``."""

from handheld.cli import main

main()
