"""``python -m diffaccel``."""

from .cli import main

main()
