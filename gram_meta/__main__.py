import sys

from gram_meta.cli import main

sys.exit(main())
