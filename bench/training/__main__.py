"""``python -m bench.training``: see `bench.training.command`."""

import sys

from bench.training.command import main

if __name__ == "__main__":
    sys.exit(main())
