"""How the built-in engine reads images: kept ones, processes that stay, and reading ahead; the numbers never change."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import gram_meta.images
from gram_meta import engine
from gram_meta.engine.builtin.transforms import ToBytes
from gram_meta.engine.options import complete_cfg, extend_cfg
from gram_meta.images import UnreadableImage, kept_images, read_rgb
from gram_meta.processes import worker_count, workers_for

if engine.backend() != "builtin":
    pytest.skip("the real Dassl is the backend: these are tests of the built-in engine", allow_module_level=True)

ALL = 12 * 30 * 40 * 4  # bytes of the images below, as Pillow holds them


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = [str(folder / f"{number}.jpg") for number in range(12)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
    return [SimpleNamespace(impath=path, label=label, domain=0) for label, path in enumerate(paths)]


@pytest.fixture
def decoded(monkeypatch):
    """The number of files that this process has decoded, in a list of one number."""
    count, decode = [0], gram_meta.images.decode_image

    def counted(*args):
        count[0] += 1
        return decode(*args)

    monkeypatch.setattr(gram_meta.images, "decode_image", counted)
    return count


def loader_of(items, workers, is_train=True):
    cfg = engine.get_cfg_default()
    extend_cfg(cfg)
    cfg.INPUT.SIZE, cfg.INPUT.TRANSFORMS = (8, 8), ("random_resized_crop", "random_flip", "normalize")
    cfg.DATALOADER.NUM_WORKERS = workers
    sampler = "RandomSampler" if is_train else "SequentialSampler"
    return engine.build_data_loader(
        cfg, sampler, items, 5, tfm=engine.build_transform(cfg, is_train=is_train), is_train=is_train
    )


def as_torch_loads(loader):
    """Return torch's own loader of the same images, which starts its processes anew in every epoch."""
    given = {name: getattr(loader, name) for name in ("batch_size", "sampler", "num_workers", "drop_last")}
    return DataLoader(loader.dataset, **given)


def crops(loader, epochs=3, between=lambda epoch: None):
    torch.manual_seed(3)
    found = []
    for epoch in range(epochs):
        found += [batch["img"] for batch in loader]
        between(epoch)
    return torch.stack(found), torch.rand(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_are_those_of_torchs_own_loader_also_of_kept_images(items, workers):
    plain, state = crops(as_torch_loads(loader_of(items, workers)))
    assert plain.shape == (6, 5, 3, 8, 8) and len(plain.flatten(1).unique(dim=0)) == 6
    ours = loader_of(items, workers)
    for kept in (0, ALL):
        with kept_images([item.impath for item in items], kept, False):
            found, after = crops(ours)
        assert torch.equal(found, plain) and torch.equal(after, state)
        ours.end_workers()


def test_processes_stay_over_epochs_and_end_when_they_are_told(items):
    loader, seen = loader_of(items, 2), []

    def note(epoch):
        seen.append([worker.pid for worker in loader._iterator._workers])

    crops(loader, between=note)
    assert seen[0] == seen[1] == seen[2]
    workers = loader._iterator._workers
    loader.end_workers()
    assert not any(worker.is_alive() for worker in workers)


def test_an_epoch_that_was_broken_off_leaves_nothing_to_the_next(items):
    found = []
    for loader in (loader_of(items, 2), as_torch_loads(loader_of(items, 2))):
        torch.manual_seed(3)
        next(iter(loader))
        found.append([batch["img"] for batch in loader])
    assert all(map(torch.equal, *found))


def test_kept_images_are_decoded_once_and_forgotten(items, decoded):
    paths = [item.impath for item in items]
    fresh = [read_rgb(path).tobytes() for path in paths]
    assert decoded == [12]
    with kept_images([*paths, *paths], ALL, False) as fits:
        assert fits and decoded == [24]
        assert [read_rgb(path).tobytes() for path in paths * 2] == fresh * 2 and decoded == [24]
        with gram_meta.images.coop_decoding(True):
            read_rgb(paths[0])
        assert decoded == [25]
    read_rgb(paths[0])
    assert decoded == [26]


def test_images_beyond_the_budget_are_decoded_every_time(items, decoded):
    paths = [item.impath for item in items]
    with kept_images(paths, ALL - 1, False) as fits:
        assert not fits and not gram_meta.images._kept
        read_rgb(paths[0])
    assert decoded == [13]
    with kept_images(paths, 0, False) as fits:  # switched off
        assert fits and decoded == [13]


def test_a_broken_image_is_reported_where_it_is_read(items, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(b"no image")
    with kept_images([str(tmp_path / "cut.jpg"), items[0].impath], ALL, False) as fits:
        assert fits
        with pytest.raises(UnreadableImage, match=r"cut.jpg: expected an image, found: not an image"):
            read_rgb(tmp_path / "cut.jpg")


def test_a_test_loader_reads_ahead_in_a_thread(items):
    expected = [batch["img"] for batch in loader_of(items, 0, is_train=False)]
    loader, threads = loader_of(items, 0, is_train=False), set()
    assert not loader.reads_ahead  # as there is no GPU
    transform = loader.dataset.transform

    def noted(image):
        threads.add(threading.current_thread())
        return transform(image)

    loader.reads_ahead, loader.dataset.transform = True, noted
    found = [batch["img"] for batch in loader]
    assert len(found) == 3 and all(map(torch.equal, found, expected))
    assert len(threads) == 1 and threading.current_thread() not in threads


@pytest.mark.parametrize("workers", [0, 2])
def test_bytes_that_are_normalised_on_the_device_give_the_same_numbers(items, workers):
    expected, _ = crops(loader_of(items, workers))
    loader = loader_of(items, workers)
    assert loader.normalise is None  # as there is no GPU
    loader.normalise_on(torch.device("cpu"))
    sent, normalised = set(), loader._normalised
    loader._normalised = lambda batch: sent.add(batch["img"].dtype) or normalised(batch)
    assert torch.equal(crops(loader)[0], expected)
    assert sent == {torch.uint8 if workers else torch.float32}
    again = engine.build_data_loader(loader.dataset.cfg, data_source=items, tfm=loader.dataset.transform)
    assert loader.dataset[0]["img"].dtype == torch.float32  # for every other loader
    again.dataset.transform = lambda image: torch.zeros(3, 8, 8)
    again.normalise_on(torch.device("cpu"))  # does not end in a normalisation
    assert again.normalise is None and again.dataset[0]["img"].dtype == torch.float32


def test_crops_on_the_device_need_no_processes_and_copy_a_kept_image_once(items, monkeypatch):
    on_cpu = ToBytes(torch.device("cpu"))
    away = ToBytes(torch.device("meta"))  # as a GPU, whose memory is not this process's
    with kept_images([item.impath for item in items], ALL, False):
        first = away(read_rgb(items[0].impath))
        assert first.is_meta and away(read_rgb(items[0].impath)) is first
        assert on_cpu(read_rgb(items[0].impath)).shape == first.shape == (3, 40, 30)
    assert away(read_rgb(items[0].impath)) is not first
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = engine.get_cfg_default()
    cfg.INPUT.CROP_ON, cfg.DATALOADER.NUM_WORKERS = "device", 2
    loader = engine.build_data_loader(cfg, data_source=items)
    assert (loader.num_workers, loader.pin_memory, loader.normalise) == (0, False, None)
    assert engine.build_transform(cfg).transforms[0].device == torch.device("cuda")
    cfg.USE_CUDA = False
    loader = engine.build_data_loader(cfg, data_source=items)
    assert loader.num_workers == 2 and engine.build_transform(cfg).transforms[0].device == torch.device("cpu")


@pytest.mark.parametrize("workers", [0, 2])
def test_test_images_that_a_gpu_crops_are_read_ahead(items, tmp_path, monkeypatch, workers):
    """By processes, which leave the crops to this one, or by a thread; the numbers are those of crops on tensors."""
    Image.new("RGB", (50, 20), (9, 99, 199)).save(tmp_path / "wide.jpg")
    items = [*items, SimpleNamespace(impath=str(tmp_path / "wide.jpg"), label=3, domain=0)]
    cfg = engine.get_cfg_default()
    cfg.INPUT.SIZE, cfg.INPUT.TRANSFORMS, cfg.DATALOADER.NUM_WORKERS = (8, 8), ("normalize",), workers
    loaders = {}
    for on in ("tensors", "device"):
        cfg.INPUT.CROP_ON = on
        monkeypatch.setattr(torch.cuda, "is_available", lambda on=on: on == "device")
        transform = engine.build_transform(cfg, is_train=False)
        options = {"batch_size": 5, "tfm": transform, "is_train": False}
        loaders[on] = engine.build_data_loader(cfg, data_source=items, **options)
    monkeypatch.undo()
    loader = loaders["device"]
    assert (loader.num_workers, loader.pin_memory, loader.reads_ahead) == (workers, workers > 0, not workers)
    transform.transforms[0].device, loader.pin_memory = torch.device("cpu"), False  # in place of the GPU
    sent = []
    if workers:
        assert loader.crop.device == torch.device("cuda")
        loader.crop.device = torch.device("cpu")
        steps = loader.crop.steps
        loader.crop.steps = lambda image: sent.append(image.shape) or steps(image)
    expected, found = (list(loaders[on]) for on in ("tensors", "device"))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours["img"], theirs["img"]) and torch.equal(ours["label"], theirs["label"])
        assert ours["impath"] == theirs["impath"]
    assert sent == ([(3, 40, 30)] * 12 + [(3, 20, 50)] if workers else [])


def test_errors_of_the_thread_that_reads_ahead_arrive(items, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(b"no image")
    bad = SimpleNamespace(impath=str(tmp_path / "cut.jpg"), label=0, domain=0)
    loader = loader_of([*items, bad], 0, is_train=False)
    loader.reads_ahead = True
    with pytest.raises(UnreadableImage, match="cut.jpg: expected an image"):
        list(loader)


def test_the_default_number_of_workers_follows_the_cores(monkeypatch):
    for cores, processes, expected in ((1, 1, 1), (6, 1, 6), (64, 1, 8), (16, 4, 4), (2, 4, 1)):
        monkeypatch.setattr("gram_meta.processes.cores", lambda cores=cores: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert worker_count(-1) == worker_count() == expected
        assert workers_for(torch.device("cuda")) == expected and workers_for(torch.device("cpu")) == 0
    assert worker_count(0) == 0 and worker_count(20) == 20
    cfg = engine.get_cfg_default()
    cfg.DATALOADER.NUM_WORKERS = -1
    complete_cfg(cfg)
    assert cfg.DATALOADER.NUM_WORKERS == 1  # of 2 cores for 4 processes
