"""`nat-models export` from a checkout."""

import sys

from nat_models.cli import main

if __name__ == "__main__":  # processes that load images import this file again
    sys.exit(main(["export", *sys.argv[1:]]))
