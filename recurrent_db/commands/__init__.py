"""The commands of `recurrent-db`, one file each.

A command is a dataclass `Args`, whose docstring is its help, and two functions. ``arguments(words, prog)`` parses the words
of the command line. ``run(args)`` does the work and returns the exit status; it imports what it needs when it is called, so
that ``--help`` does not wait for torch: no module here imports torch at its top.
"""
