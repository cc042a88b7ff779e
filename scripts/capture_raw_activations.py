"""The command `tlcapture capture` as a script."""

from tlcapture.cli.capture import capture

if __name__ == "__main__":
    capture()
