"""`python -m lowra`."""

import sys

from .commands import main

sys.exit(main())
