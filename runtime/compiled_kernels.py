"""How many compiled kernels the process keeps: oneDNN compiles one for every shape of a 16-bit product on a CPU."""

import os

KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "1"}
"""Shapes that oneDNN keeps kernels of: those of a pass over 16K tokens of prompt, whose blocks of queries see ever more
keys; and that torch keeps descriptions of above it, of which 0 crashes (torch 2.13). Both keep 1024 by default, half a
GiB that no budget knows of. Descriptions take 0.26 MiB of the 0.59 that a shape takes and save 3 µs of a product of 25;
without a kernel it takes 210 (``bmm`` of 1 to 40 vectors, AMD EPYC, torch 2.13, least of 20)."""


def limit() -> None:
    """Keep no more than :data:`KEPT`, unless the environment says otherwise; to be called before the first product."""
    for name, shapes in KEPT.items():
        os.environ.setdefault(name, shapes)
