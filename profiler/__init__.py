"""Measures a machine by timing what the runtime executes, and writes it as a hardware file."""

from costmodel.commands import signals as _signals  # noqa: F401  first: what follows takes a while to import
