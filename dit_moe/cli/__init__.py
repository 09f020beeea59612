"""The command line `dit-moe`."""

from .app import app


def main() -> None:
    """Entry point of the script `dit-moe` and of `python -m dit_moe`."""
    app(prog_name="dit-moe")


__all__ = ["app", "main"]
