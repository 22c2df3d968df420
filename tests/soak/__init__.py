"""A soak: the commands of `gram`, disturbed at random for some minutes. `python tests/soak --help`."""
