"""The command `macrobatch`, outside of the package, so that Ctrl-C while torch is imported ends in a word, too."""

import sys


def main() -> None:
    """The command named on the command line has run, and the process ends with its exit code."""
    try:
        from macrobatch.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
