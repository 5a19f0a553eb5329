"""``python -m simclr_scale`` and the ``simclr-scale`` script."""

import sys

from simclr_scale.cli import main as run


def main() -> None:
    sys.exit(run())


if __name__ == "__main__":
    main()
