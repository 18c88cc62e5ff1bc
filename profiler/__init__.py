"""Measures a machine by timing what the runtime executes, and writes it as a hardware file."""
