"""`python -m cbd_trl.cli`, for launchers that take a module."""

import sys

from cbd_trl.cli.main import main

sys.exit(main())
