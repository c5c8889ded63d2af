"""``python -m gradwire_cli`` is ``gradwire``."""

import sys

from gradwire_cli import main

sys.exit(main())
