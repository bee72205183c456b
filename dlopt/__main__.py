"""`python -m dlopt`, where the `dlopt` command is not on the path."""

import sys

from dlopt.cli import main

sys.exit(main())
