"""Run the command line by `python -m movae_fast` or `torchrun -m movae_fast`."""

import sys

from movae_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
