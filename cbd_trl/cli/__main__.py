"""`python -m cbd_trl.cli`, for launchers that take a module."""

from cbd_trl.cli.main import main

main()
