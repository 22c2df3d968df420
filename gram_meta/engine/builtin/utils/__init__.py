"""Small helpers: files, seeds, meters, registry, checkpoints, logger."""
# ruff: noqa: F403

from gram_meta.engine.builtin.utils.logger import *
from gram_meta.engine.builtin.utils.meters import *
from gram_meta.engine.builtin.utils.registry import *
from gram_meta.engine.builtin.utils.tools import *
from gram_meta.engine.builtin.utils.torchtools import *
