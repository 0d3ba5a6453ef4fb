"""`python -m macrobatch.cli`: the same as the command `macrobatch`."""

from macrobatch.cli import main

main()
