"""`python -m worker` is the command `darkroom`."""

from worker.cli import main

main()
