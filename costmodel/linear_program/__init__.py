"""The best splits for one batch shape and fixed switches: one linear program, written two ways.

Variables are the amounts of :mod:`costmodel.formulations.base` for ``prompts`` reference prompts, so
``blocks`` = prompts / block size. For one batch shape ``blocks`` is a number and the program gives the
best splits. For a range of shapes ``blocks`` is a variable too: dividing the linear-fractional program
"seconds per block / prompts per block" by its denominator (Charnes and Cooper, 1962) leaves exactly the
same rows, and the optimum bounds every shape of the range.

Memory is in GB and time in ms. :func:`solve` hands HiGHS the coefficients directly (:mod:`.coefficients`,
:mod:`.highs`); :func:`readable` builds the same program in PuLP, constraint by named constraint. Tests hold the
two equal, for HiGHS and CBC.
"""

from costmodel.linear_program.optimum import (
    least_extra_bytes,
    parts_in_part,
    solve,
    solve_lexicographic,
    uncounted_s,
)
from costmodel.linear_program.question import FixedSplits, Question, Solution
from costmodel.linear_program.readable import readable

__all__ = [
    "FixedSplits",
    "Question",
    "Solution",
    "least_extra_bytes",
    "parts_in_part",
    "readable",
    "solve",
    "solve_lexicographic",
    "uncounted_s",
]
