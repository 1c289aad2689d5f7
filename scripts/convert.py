"""Quantizes a model, as `exlq convert` does: convert.py -i BASE -o OUT -c TEXT.parquet -b 5.0"""

import sys

from exlq.cli import convert_main

if __name__ == "__main__":
    sys.exit(convert_main())
