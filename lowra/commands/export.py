"""`lowra export`: an adapter for the original of its packed base."""

import argparse

from ..checkpoints.places import expanded
from ..integrations.exporting import export_adapter


def run(args: argparse.Namespace) -> dict:
    """
    Raises:
        FileNotFoundError, ValueError: see `export_adapter`.
    """
    result = export_adapter(
        expanded(args.adapter), None if args.initial is None else expanded(args.initial), args.output
    )
    print(f"{args.output}: a LoRA of rank {result['rank']} for {result['base']}")
    return result
