"""`python -m lowra`."""

import sys

from lowra_command import main

sys.exit(main())
