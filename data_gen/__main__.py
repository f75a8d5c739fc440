"""`python -m data_gen CONFIG.yaml [key=value …]` is `autosparse generate`."""

import sys

from autosparse.cli import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
