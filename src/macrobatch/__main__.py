"""`python -m macrobatch`: the same as the command `macrobatch`."""

from macrobatch.cli import main

main()
