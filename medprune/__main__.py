"""`python -m medprune`: the command line."""

from medprune.cli import console

console()
