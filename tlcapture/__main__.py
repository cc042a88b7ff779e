"""Run the command line with `python -m tlcapture`."""

from tlcapture.cli.main import main

main()
