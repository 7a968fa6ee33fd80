"""The command line."""

from culpa.cli.entry import main as main
