"""Writing what a command found: JSON, policy files and figures."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from costmodel import records
from costmodel.commands import outcome, parsing
from costmodel.policy import Policy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write(args: argparse.Namespace, *, data: dict[str, Any], policy: Policy | None) -> list[str]:
    """Write the JSON and policy files that were asked for; their names."""
    written = []
    if args.json == parsing.STANDARD_OUTPUT:
        unicode = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
        outcome.say(json.dumps(data, indent=2, ensure_ascii=not unicode, allow_nan=False) + "\n")
    elif args.json is not None:
        records.write_json(data, args.json)
        written.append(str(args.json))
    if policy is not None and args.save_policy is not None:
        policy.save(args.save_policy)
        written.append(str(args.save_policy))
    return written


def draw(figure: "Figure", path: Path) -> str:
    """Write a figure in the format of the file's suffix; its name."""
    from costmodel.figures import render

    records.write_bytes(render(figure, parsing.figure_format(path)), path)
    return str(path)
