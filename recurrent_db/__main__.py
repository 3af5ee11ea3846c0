"""``python -m recurrent_db`` is the ``recurrent-db`` command."""

from recurrent_db.cli import main

main()
