"""Figures: one function each, from results to matplotlib axes; nothing global stays changed.

>>> figure = policy_figure(search(hardware=..., model=...))
>>> figure.savefig("policy.pdf")
"""

from costmodel.figures.frontier import draw_frontier, frontier_figure
from costmodel.figures.policy import draw_busy, draw_memory, policy_figure
from costmodel.figures.style import render

__all__ = ["draw_busy", "draw_frontier", "draw_memory", "frontier_figure", "policy_figure", "render"]
