"""``python -m bench.load``."""

import sys

from bench.load.command import main

sys.exit(main())
