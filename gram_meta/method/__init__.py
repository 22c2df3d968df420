"""The method of the paper; ARCHITECTURE.md lists its modules in reading order."""
