"""Will measure a machine by timing what the runtime executes, as a hardware file; empty until a later version."""
