"""What every test starts from: no network, and the repository's own `datasets/` never found as a top-level package."""

import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ROOMS = {"GRAM_DASSL": "auto (the real Dassl where it imports)", "GRAM_CHECKOUTS": "none"}

# `python -m pytest` puts the working directory first on the path, where `datasets/` hides Hugging Face's `datasets`.
here = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() == ROOT]
sys.path[:] = [entry for entry in sys.path if entry not in here] + here
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_report_header():
    """Which Dassl is asked for, and where checkouts to try it on are (tests/engine/test_real_dassl.py)."""
    return [f"{name}: {os.environ.get(name) or default}" for name, default in ROOMS.items()]


@pytest.fixture(scope="module")
def one_thread():
    """One thread, as in the processes that tests start: results are equal to the byte at equal numbers of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def forked(one_thread):
    """`forked.py`: jobs of several processes; this process and those of the job have one thread each."""
    from helpers import forked

    return forked


@pytest.fixture(scope="module")
def backbone(request):
    """The random tiny CLIP, in the test file's PRECISION (fp32 without one)."""
    from gram_meta.backbone.clip import load_backbone

    return load_backbone("random-tiny", precision=getattr(request.module, "PRECISION", "fp32"))


@pytest.fixture
def one_loading(backbone, monkeypatch):
    """Give every trainer and predictor the same random tiny CLIP; other CLIPs and precisions are loaded."""
    from gram_meta.backbone import clip
    from gram_meta.trainers import base

    load = base.load_backbone

    def cached(name, device="cpu", precision="fp32"):
        return backbone if (name, precision) == ("random-tiny", "fp32") else load(name, device, precision)

    for module in (base, clip):
        monkeypatch.setattr(module, "load_backbone", cached)


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch):
    """Tests end processes, not the power supply: fsync is not needed."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def pixel_corpus(tmp_path_factory):
    """A store with image files on disk, and a hierarchy over it: 6 topics, 2 domains of 8 images each."""
    import numpy as np
    from PIL import Image

    from gram_meta.backbone.clip import load_backbone
    from gram_meta.clustering.hierarchy import Hierarchy, Topic
    from gram_meta.corpus.store import PairStore

    folder = tmp_path_factory.mktemp("corpus")
    backbone = load_backbone("random-tiny")
    random = np.random.default_rng(1)
    locations = []
    for i in range(96):
        pixels = random.integers(0, 256, (40, 32, 3), dtype=np.uint8) // 2 + 20 * (i // 16)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        locations.append(f"{i}.png")

    class Store:
        path, fingerprint, image_root, in_shards = folder / "store", "store-1", folder, None
        crops_tensors = False
        image_features = random.normal(size=(96, 64)).astype(np.float16)

        def check_backbone(self, backbone):
            pass

    Store.locations = locations
    Store.places = PairStore.places
    pair = np.arange(96)
    words = ["cat", "dog", "house", "tree", "boat", "lamp"]
    topics = [Topic(word, 1.0, [[word, 1.0]], 16, 16, [8, 8]) for word in words]
    hierarchy = Hierarchy(pair, pair, pair // 16, pair // 8 % 2, topics, np.zeros(96, np.uint8), {"fingerprints": {}})
    hierarchy.check_store = lambda store: None
    return Store(), hierarchy, backbone, folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A root with EmojiFood and EmojiTravel: noisy squares of four classes, 2 / 1 / 2 images each."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("tiny data")
    rng = np.random.default_rng(0)
    for name in ("food", "travel"):
        folder = root / f"emoji_{name}"
        (folder / "images").mkdir(parents=True)
        split = {"train": [], "val": [], "test": []}
        for label, classname in enumerate(("red", "green", "blue", "grey")):
            for part, count in (("train", 2), ("val", 1), ("test", 2)):
                for index in range(count):
                    file = f"{classname}_{part}_{index}.png"
                    pixels = rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)
                    Image.fromarray(pixels).save(folder / "images" / file)
                    split[part].append([file, label, classname])
        (folder / f"split_zhou_Emoji{name.title()}.json").write_text(json.dumps(split))
    return root


@pytest.fixture(scope="session")
def tiny_options():
    """KEY VALUE for `gram train` on it: a random tiny CLIP, one epoch."""
    return ("MODEL.BACKBONE.NAME", "random-tiny", "INPUT.SIZE", "(32,32)", "OPTIM.MAX_EPOCH", "1")
