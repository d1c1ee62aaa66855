"""`python -m experiments`: see `experiments.runner`."""

import sys

from experiments.runner import main

if __name__ == "__main__":
    sys.exit(main())
