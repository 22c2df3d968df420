"""What every test starts from: no network, and the repository's own `datasets/` never found as a top-level package."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` puts the working directory first on the path, where `datasets/` hides Hugging Face's `datasets`.
here = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() == ROOT]
sys.path[:] = [entry for entry in sys.path if entry not in here] + here
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
