"""``python -m bench.spread``."""

import sys

from bench.spread.command import main

sys.exit(main())
