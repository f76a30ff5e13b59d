"""What the subcommands of `lowra` do, a module each; what can be typed is in `lowra_command`."""

from lowra_command import build_parser, main

__all__ = ["build_parser", "main"]
