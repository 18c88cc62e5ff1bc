"""Settings that every test shares."""

import os

from hypothesis import settings

# A loaded machine must not fail a test (no deadline), and CI must fail on the same examples twice.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
