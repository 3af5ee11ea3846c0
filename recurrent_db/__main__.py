"""Runs the ``recurrent-db`` command as ``python -m recurrent_db``."""

from recurrent_db.cli import main

main()
