"""`nat-models train` from a checkout."""

import sys

from nat_models.cli import main

if __name__ == "__main__":  # processes that load images import this file again
    sys.exit(main(["train", *sys.argv[1:]]))
