"""A tiny corpus, settings and trainers for tests of meta-training."""

import numpy as np
import torch

from gram_meta.clustering.hierarchy import Hierarchy, Topic
from gram_meta.config import load_meta_config
from gram_meta.errors import GramError
from gram_meta.method.meta_trainer import MetaTrainer
from gram_meta.method.prompts import ClassText

WORDS = ["cat", "dog", "house", "tree", "boat", "lamp", "spoon", "cloud"]


class Store:
    """What meta-training asks of a pair store: features near the topics' text features under a context to be found."""

    fingerprint = "store-1"
    path = "store"

    def __init__(self, backbone):
        random = torch.Generator().manual_seed(2)
        context = torch.randn(4, 64, generator=random)
        topics = ClassText(backbone, WORDS, 4).features(context)
        shifts = torch.nn.functional.normalize(torch.randn(2, 64, generator=random), dim=-1)
        features = topics[:, None, None] + 0.5 * shifts[:, None] + 0.2 * torch.randn(8, 2, 12, 64, generator=random)
        features = torch.nn.functional.normalize(features, dim=-1).flatten(0, 2)
        self.image_features = features.numpy().astype(np.float16)
        self.backbone = backbone.fingerprint

    def check_backbone(self, backbone):
        if backbone.fingerprint != self.backbone:
            raise GramError("store: other backbone")


def make_hierarchy():
    pair = np.arange(8 * 2 * 12)
    topics = [Topic(word, 1.0, [[word, 1.0]], 24, 24, [12, 12]) for word in WORDS]
    columns = (pair, pair, pair // 24, pair // 12 % 2)
    hierarchy = Hierarchy(*columns, topics, np.zeros(len(pair), np.uint8), {"fingerprints": {}})
    hierarchy.check_store = lambda store: None
    return hierarchy


def settings(*opts):
    return load_meta_config(
        [],
        [
            *("BACKBONE.NAME", "random-tiny", "TASKS.WAYS", "3", "TASKS.HELD_OUT", "0.4", "TASKS.SUPPORT_SHOTS", "2"),
            *("TASKS.QUERY_SHOTS", "4", "OUTER.STEPS", "12", "EVAL.EVERY", "4", "EVAL.TASKS", "6", "OUTER.BATCH", "2"),
            *("CHECKPOINT.EVERY", "4", "OUTER.LR_REGULATOR", "1e-2", "OUTER.LR_PROMPT", "5e-3"),
            *opts,
        ],
    )


def trainer(store, out, *opts):
    return MetaTrainer(store, make_hierarchy(), out, settings(*opts), progress=False)


def pixel_settings(*opts):
    return load_meta_config(
        [],
        [
            *("BACKBONE.NAME", "random-tiny", "TASKS.WAYS", "2", "TASKS.HELD_OUT", "0.4", "TASKS.SUPPORT_SHOTS", "2"),
            *("TASKS.QUERY_SHOTS", "4", "OUTER.STEPS", "4", "EVAL.EVERY", "2", "EVAL.TASKS", "3", "OUTER.BATCH", "2"),
            *("CHECKPOINT.EVERY", "2", "PROMPT.TEXT_TOKENS", "2", "PROMPT.WORDS", "a photo", *opts),
        ],
    )


JOINT = ("PROMPT.VISUAL_TOKENS", "2")
VISUAL = (*JOINT, "PROMPT.TEXT_TOKENS", "0")
DEEP = (*JOINT, "PROMPT.TEXT_DEPTH", "2", "PROMPT.VISUAL_DEPTH", "2")
MAPLE = (*DEEP, "PROMPT.FAMILY", "maple", "PROMPT.FIXED_WORDS", "of a")


def pixel_trainer(pixel_corpus, out, *opts):
    store, hierarchy, _, _ = pixel_corpus
    return MetaTrainer(store, hierarchy, out, pixel_settings(*opts), progress=False)
