"""Quantizes a model: python scripts/convert.py -i BASE -o OUT -c TEXT.parquet -b BITS (the same as `exlq convert`)."""

import sys

from exlq.cli import convert_main

if __name__ == "__main__":
    sys.exit(convert_main())
