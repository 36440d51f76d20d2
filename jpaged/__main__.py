"""``python -m jpaged`` is the ``jpaged`` command."""

import sys

from jpaged.cli import main

sys.exit(main())
