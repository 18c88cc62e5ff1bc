"""The command line: what ``tierwise`` and ``python -m costmodel.…`` call; the library itself never prints."""
