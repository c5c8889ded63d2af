"""``python -m bench.links``."""

import sys

from bench.links.command import main

sys.exit(main())
