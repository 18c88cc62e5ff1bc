"""How many compiled kernels the process keeps: oneDNN compiles one for every shape of a 16-bit product on a CPU."""

import os

KEPT = 256
"""Shapes whose kernels are kept: those of a pass over 16K tokens of prompt, whose blocks of queries see ever more keys.
Both caches keep 1024 by default, which is half a GiB that no budget knows of."""

_CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""oneDNN's own cache and the one that torch keeps above it; each is asked for when it is first used."""


def limit() -> None:
    """Keep no more than :data:`KEPT`, unless the environment says otherwise; to be called before the first product."""
    for name in _CAPACITIES:
        os.environ.setdefault(name, str(KEPT))
