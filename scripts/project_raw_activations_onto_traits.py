"""The command `tlcapture project` as a script."""

import sys

from tlcapture.cli.main import main

if __name__ == "__main__":
    main(["project", *sys.argv[1:]], prog_name="tlcapture")
