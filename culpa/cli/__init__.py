"""The command line."""

from culpa.cli.app import main as main
