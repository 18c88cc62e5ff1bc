"""How many compiled kernels the process keeps: oneDNN compiles one for every shape of a 16-bit product on a CPU."""

import os

KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "1"}
"""oneDNN: shapes whose kernels are kept, those of a pass over 16K tokens of prompt, whose blocks of queries see ever
more keys. torch: descriptions kept above them, 1 since 0 crashes torch 2.13. Both keep 1024 by default, half a GiB that
no budget knows of. A description takes 0.26 of the 0.59 MiB that a shape takes, and saves 3 of 25 µs; a product whose
kernel must be compiled takes 210 µs (``bmm`` of 1 to 40 vectors, AMD EPYC, torch 2.13, least of 20)."""


def limit() -> None:
    """Keep no more than :data:`KEPT`, unless the environment says otherwise; to be called before the first product."""
    for name, shapes in KEPT.items():
        os.environ.setdefault(name, shapes)
