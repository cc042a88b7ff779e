"""Starts a worker of Ray as a fork of a process that has everything imported.

Ray runs this in place of its own script, whose arguments are the same. It imports little, so that it ends soon.
"""

import json
import os
import socket
import sys

SOCKET = "TLCAPTURE_TEST_WORKERS"  # the name of the variable with the path where that process listens


def main() -> None:
    """Ask for a fork, and wait until it ends."""
    with socket.socket(socket.AF_UNIX) as warm:
        warm.connect(os.environ[SOCKET])
        content = {"words": sys.argv[1:], "variables": dict(os.environ), "folder": os.getcwd(), "raylet": os.getppid()}
        socket.send_fds(warm, [json.dumps(content).encode() + b"\n"], [1, 2])
        warm.recv(1)


if __name__ == "__main__":
    main()
