"""Data shipped with the package: machines, models and published measurements, each with its source."""
