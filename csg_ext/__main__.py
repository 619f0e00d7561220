"""`python -m csg_ext`: the same as the command csg-ext."""

import sys

from csg_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
