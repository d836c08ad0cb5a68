"""`python -m worker` is the command `darkroom`."""

from worker.cli.main import main

main()
