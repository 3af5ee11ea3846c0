"""The commands of `recurrent-db`, one file each.

A command is a dataclass `Args` and two functions. The docstrings of `Args` and of its fields are the ``--help`` text.
``arguments(words, prog)`` parses the command line. ``run(args)`` does the work and returns the exit status.

No module here imports torch at its top, so that ``--help`` is fast. ``run`` imports what it needs.
"""
