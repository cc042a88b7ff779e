"""The command `tlcapture project` as a script."""

from tlcapture.cli.project import project

if __name__ == "__main__":
    project()
