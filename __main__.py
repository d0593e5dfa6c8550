"""`python -m octavo`: the command line, also where no console script is installed."""

from .launch.cli import main

main()
