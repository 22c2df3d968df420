"""CoOp's command line with this project's trainers and datasets. `python train.py --help` lists the flags."""

import sys

from gram_meta.coop.launch import main

if __name__ == "__main__":
    sys.exit(main())
