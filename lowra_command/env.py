"""`lowra env`: versions, GPUs, native libraries and kernels in use."""

import argparse

from .parser import Later


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "env",
        help="show versions, GPUs, and which kernels run here and why others do not",
        description="Shows what lowra finds here: versions, GPUs and driver, native libraries, the kernels in use "
        "(each tried on a small weight) and why others are not, and integrations that a changed library switched off. "
        "Put its output into a bug report.",
    )
    parser.set_defaults(run=Later("lowra.commands.env:run"))
