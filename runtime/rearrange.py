"""Rearrangements: how a tensor of ours is made from what a checkpoint holds, for weights and biases alike.

Every function gives a :data:`Take`, which works on the first dimension (the rows of a matrix, the values
of its bias) and leaves the others alone.
"""

from collections.abc import Callable

from torch import Tensor

Take = Callable[[Tensor], Tensor]


def transposed(tensor: Tensor) -> Tensor:
    """GPT-2's matrices are (in, out); its biases are as everyone's."""
    return tensor.t()


def part(index: int, of: int) -> Take:
    """One of several matrices of equal size that lie one behind the other."""
    return lambda tensor: tensor.chunk(of)[index]


def rows(start: int, stop: int) -> Take:
    """A range of rows."""
    return lambda tensor: tensor[start:stop]


def part_of_each(index: int, of: int, *, blocks: int) -> Take:
    """One of several parts of equal size of each of ``blocks`` blocks, in which the tensor is cut first.

    BLOOM and GPT-NeoX: query, key and value of each head. CodeGen: of each of four shares of the heads.
    """

    def take(tensor: Tensor) -> Tensor:
        return tensor.reshape(blocks, of, -1, *tensor.shape[1:])[:, index].flatten(0, 1)

    return take


def half_split(head_dim: int, rotary_dim: int) -> Take:
    """Bring rotary pairs of neighbours into the order of :mod:`runtime.rotary`: of each head's rows, 0, 2, …, 1, 3, …

    The first ``rotary_dim`` rows of each head move, the others stay. Queries and keys move alike, so that
    their products stay what they are.
    """
    order = [*range(0, rotary_dim, 2), *range(1, rotary_dim, 2), *range(rotary_dim, head_dim)]

    def take(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, head_dim, *tensor.shape[1:])[:, order].flatten(0, 1)

    return take


def then(*steps: Take | None) -> Take | None:
    """One after the other, those that are there; None if none is."""
    takes = [step for step in steps if step is not None]
    if not takes:
        return None

    def take(tensor: Tensor) -> Tensor:
        for step in takes:
            tensor = step(tensor)
        return tensor

    return take
