"""`python -m nat_models` is `nat-models`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
