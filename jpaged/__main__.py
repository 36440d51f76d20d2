"""``python -m jpaged`` is the ``jpaged`` command."""

import sys

from jpaged.cli.main import main

sys.exit(main())
