"""The commands of `gram`, a module each: HELP, add_arguments(parser) and run(args) -> exit status.

These modules import nothing heavy at their top, so that `gram --help` answers at once.
"""
