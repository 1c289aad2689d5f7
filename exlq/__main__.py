"""`python -m exlq`."""

import sys

from exlq.cli import main

if __name__ == "__main__":
    sys.exit(main())
