"""``python -m trilobe`` is the command line."""

from trilobe.cli import main

main()
