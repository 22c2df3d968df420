"""What every test starts from: no network, and the repository's own `datasets/` never found as a top-level package."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` puts the working directory on the path, where `datasets/` would hide Hugging Face's `datasets`.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != ROOT]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
