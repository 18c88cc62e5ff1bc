"""Everything this package raises on purpose.

    TierwiseError            exit code
    ├── InputError           2   a file, flag or value is wrong: names it, its value and the limit
    │   (runtime.checkpoint.CheckpointError is one)
    ├── InfeasibleError      3   no policy fits: names the limit that fails and what would mend it
    ├── SolverError          4   the LP solver gave no usable answer
    └── runtime.disk.DiskError  5   the disk failed or is full

Every message is one sentence for the person who typed the command.
"""


class TierwiseError(Exception):
    """Base of the tree; ``exit_code`` is what the command line returns."""

    exit_code = 1


class InputError(TierwiseError, ValueError):
    """Bad input; also a ``ValueError`` so that schema validation can add the path of the field."""

    exit_code = 2


class InfeasibleError(TierwiseError):
    """No policy satisfies the limits; ``reason`` holds the same facts for machines."""

    exit_code = 3

    def __init__(self, message: str, *, reason: dict[str, object] | None = None) -> None:
        super().__init__(message)
        self.reason: dict[str, object] = reason or {}


class SolverError(TierwiseError):
    """The solver stopped without an optimum, an infeasibility or an unbounded ray."""

    exit_code = 4
