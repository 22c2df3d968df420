"""`gram embed` by several processes, and faults: the same store byte for byte, whoever did it and whatever befell
them."""

import errno
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gram_meta import files, locks
from gram_meta.backbone.clip import load_backbone
from gram_meta.cli import main
from gram_meta.corpus.embedding import parts
from gram_meta.corpus.embedding import run as embedding
from gram_meta.corpus.embedding.index import write_index
from gram_meta.corpus.embedding.run import embed_pairs
from gram_meta.corpus.embedding.sentences import load_sentence_model
from gram_meta.corpus.places import ImageReader
from gram_meta.corpus.sources.rows import Row, Shard
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError
from gram_meta.processes import ProcessGroup

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_waiting_for_the_disk")]

ROOT = Path(embedding.__file__).parents[2]
WORDS = ["red", "green", "blue", "dog", "cat", "bird", "on", "under", "beside", "house", "tree", "road"]
OPTIONS = ["--backbone", "random-tiny", "--sentence-model", "hash:16", "--batch-size", "4", "--part-size", "5"]
SHARDS = 5


def picture(number):
    pixels = np.random.default_rng(number).integers(0, 255, (36, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def caption(draw):
    return " ".join(draw.choice(WORDS) for _ in range(5))


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Five tar shards of 8 to 12 images; every seventh image is broken."""
    folder = tmp_path_factory.mktemp("shards")
    draw = random.Random(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(8 + shard):
                key = f"{shard:05d}{number:04d}"
                image = picture(100 * shard + number)
                members = {"png": image[:40] if number % 7 == 3 else image, "txt": caption(draw).encode()}
                for suffix, content in members.items():
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.fixture(scope="session")
def one_piece(tmp_path_factory):
    """A TSV of 30 images in files of their own, with late captions of images that an earlier part has brought in."""
    folder = tmp_path_factory.mktemp("one piece")
    draw = random.Random(1)
    lines = ["image\tcaption"]
    for number in range(30):
        if number % 9 != 4:
            (folder / f"{number:02d}.png").write_bytes(picture(number))
        lines += [f"{number:02d}.png\t{caption(draw)}" for _ in range(1 + number % 3)]
    lines += [f"{number:02d}.png\t{caption(draw)}" for number in range(0, 30, 3)]
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.tsv"


def command(source, out, *options):
    return ["embed", str(source), "-o", str(out), *OPTIONS, *options]


def contents(folder):
    """All files that make up a store, byte for byte."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


@pytest.fixture
def undisturbed(forked, shards, tmp_path_factory):
    """The store of `shards`, made by one process without any trouble."""
    global _undisturbed
    if _undisturbed is None:
        out = tmp_path_factory.mktemp("stores") / "undisturbed"
        assert main(command(shards, out)) == 0
        _undisturbed = out, contents(out)
    return _undisturbed[1]


_undisturbed = None


def slowly(seconds=0.02):
    """What a process runs before its work, so that there is time to disturb it."""
    read = ImageReader.image

    def image(self, place):
        time.sleep(seconds)
        return read(self, place)

    ImageReader.image = image


def embed(source, out, *options, before=None):
    """`gram embed` in each process of a job; `before(rank)` is what goes wrong there."""

    def work(rank):
        if before is not None:
            before(rank)
        return main(command(source, out, *options))

    return work


def sentences(printed):
    return [line for text in printed for line in text.splitlines() if line.startswith("gram embed:")]


def parts_of(out):
    return len(list((out / "parts").glob("0*.npz")))


def wait_until(true, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


# --- the same store -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
def test_shards_by_several_processes(forked, shards, undisturbed, tmp_path, size):
    workers = ["--workers", "1"] if size == 2 else []
    statuses, printed = forked.run_job(size, embed(shards, tmp_path / "s", *workers), tmp_path / "printed")
    assert statuses == [0] * size, printed
    assert contents(tmp_path / "s") == undisturbed
    assert "50 rows: 50 pairs of 50 images" in printed[0] and not any(printed[1:])


def test_one_piece_by_several_processes(forked, one_piece, tmp_path):
    assert main(command(one_piece, tmp_path / "alone")) == 0
    statuses, printed = forked.run_job(2, embed(one_piece, tmp_path / "s"), tmp_path / "printed")
    assert statuses == [0, 0], printed
    assert contents(tmp_path / "s") == contents(tmp_path / "alone")


def test_every_process_has_a_part_of_the_work(forked, shards, undisturbed, tmp_path):
    """Which process made which part: the shares are runs of them."""

    def note(rank):
        write = parts.write_arrays

        def noted(path, arrays):
            write(path, arrays)
            print(f"part {int(path.stem)}")

        parts.write_arrays = noted

    statuses, printed = forked.run_job(2, embed(shards, tmp_path / "s", before=note), tmp_path / "printed")
    made = [[int(number) for number in re.findall(r"part (\d+)", text)] for text in printed]
    assert statuses == [0, 0] and made == [list(range(6)), list(range(6, 12))]


def test_shares_are_whole_and_even():
    for count in (0, 1, 5, 17):
        for size in (1, 2, 3, 8):
            shares = [list(ProcessGroup(rank, size).share_range(count)) for rank in range(size)]
            assert sum(shares, []) == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_another_number_of_processes_goes_on(forked, shards, undisturbed, tmp_path, before, after):
    out = tmp_path / "s"
    job = forked.Job(before, embed(shards, out, before=lambda rank: slowly()), tmp_path / "printed")
    wait_until(lambda: parts_of(out) >= 3, job.printed())
    job.send(signal.SIGKILL)
    job.wait()
    done = parts_of(out)
    assert 3 <= done < 12
    statuses, printed = forked.run_job(after, embed(shards, out), tmp_path / "again")
    assert statuses == [0] * after and f"going on after {done} of 12 parts" in printed[0]
    assert contents(out) == undisturbed


def test_the_store_reads_images_in_shards(undisturbed, shards):
    store = PairStore.open(_undisturbed[0])
    places = store.places()
    backbone = load_backbone("random-tiny")
    assert len(places) == len(store.image_features) == 50 - 9 + 2
    for row in (0, 11, len(places) - 1):
        place = places.place(row)
        with tarfile.open(shards / place.shard) as tar:
            member = tar.extractfile(place.location.removeprefix(place.shard + "/")).read()
        image = places.image(row)
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(member))))
        expected = backbone.encode_images(backbone.preprocess()(image)[None])[0]
        assert np.allclose(store.image_features[row], expected, atol=1e-3)
    assert places.shard_of.dtype == np.int32 and places.shards[places.shard_of[-1]] == "00004.tar"


# --- the index ----------------------------------------------------------------------------------------------


def two_shards():
    """Images with several captions, in shards that begin their own numbers."""

    def rows(shard):
        for image in range(4):
            for text in range(3):
                yield Row(f"{shard}/{image}.png", f"{shard} {image} {text}")
        yield Row("", "", "bad UTF-8")
        yield Row(f"{shard}/0.png", f"{shard} late")

    return [Shard(str(shard), lambda shard=shard: rows(shard)) for shard in range(2)]


def test_numbers_go_on_from_shard_to_shard(tmp_path):
    index = write_index(two_shards(), tmp_path, tmp_path / "parts", 5)
    assert (index.rows, index.pairs, index.images, index.parts) == (28, 26, 8, 6)
    assert index.skipped == {"bad UTF-8": 2} and index.sizes == [5, 5, 3, 5, 5, 3]
    assert index.bounds == [0, 2, 4, 4, 6, 8, 8] and index.first_parts == [0, 3, 6]
    pairs = [
        (number, text)
        for k in range(6)
        for number, text in zip(*index.read(k, "image", "caption").to_pydict().values(), strict=True)
    ]
    expected = [(4 * s + i, f"{s} {i} {t}") for s in range(2) for i in range(4) for t in range(3)]
    expected[12:12], expected[24 + 1 :] = [(0, "0 late")], [*expected[24 + 1 :], (4, "1 late")]
    assert pairs == expected
    places = [place.location for k in range(6) for place in index.places_of(k)]
    assert places == [f"{s}/{i}.png" for s in range(2) for i in range(4)]


def test_a_shard_that_was_read_is_not_read_again(tmp_path):
    """Dying after the first shard's index, and between the last one and the plan."""
    shards = two_shards()
    for at in range(1, 6):  # an index and its counts of each shard, and the plan
        count, replace = 0, os.replace

        def dying(here, there, at=at, replace=replace):
            nonlocal count
            count += 1
            if count == at:
                raise KeyboardInterrupt
            replace(here, there)

        folder = tmp_path / str(at)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", dying)
            write_index(shards, tmp_path, folder, 5)
        kept = {path: path.stat().st_mtime_ns for path in (folder / "index").glob("*.json")}
        assert len(kept) == (at - 1) // 2
        write_index(shards, tmp_path, folder, 5)
        assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
        assert json.loads((folder / "plan.json").read_text()) == json.loads((tmp_path / "1/plan.json").read_text())


def test_a_run_that_an_earlier_version_began(forked, one_piece, tmp_path):
    """Its parts hold other arrays: they are made anew."""
    backbone, model = load_backbone("random-tiny"), load_sentence_model("hash:16")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embedding, "join_parts", lambda *args: exec("raise KeyboardInterrupt"))
        embed_pairs(one_piece, tmp_path / "s", backbone, model, batch_size=4, part_size=5)
    plan = tmp_path / "s" / "parts" / "plan.json"
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "format": None}))
    np.savez(tmp_path / "s" / "parts" / "000001.npz", status=np.zeros(3, np.uint8))
    embed_pairs(one_piece, tmp_path / "s", backbone, model, batch_size=4, part_size=5)
    embed_pairs(one_piece, tmp_path / "alone", backbone, model, batch_size=4, part_size=5)
    assert contents(tmp_path / "s") == contents(tmp_path / "alone")


# --- faults -------------------------------------------------------------------------------------------------


def test_a_shard_that_vanishes(forked, shards, undisturbed, tmp_path):
    """Between the index and the embedding, under two processes; and before the command is given again."""
    away = tmp_path / "away.tar"

    def vanish(rank):
        run = embedding.embed_parts

        def after_index(*args):
            if rank == 1 and (shards / "00003.tar").exists():
                (shards / "00003.tar").rename(away)
            run(*args)

        embedding.embed_parts = after_index

    statuses, printed = forked.run_job(2, embed(shards, tmp_path / "s", before=vanish), tmp_path / "printed")
    try:
        assert statuses == [2, 2]
        assert len(sentences(printed)) == 1 and "00003.tar: expected the shard that was embedded" in printed[1]
        assert "Traceback" not in printed[0] + printed[1]
        statuses, printed = forked.run_job(2, embed(shards, tmp_path / "s"), tmp_path / "printed")
        assert statuses == [2, 2] and len(sentences(printed)) == 1
        assert "begun with the shard 00003.tar, which is not there any more; put it back" in printed[0]
    finally:
        away.rename(shards / "00003.tar")
    assert forked.run_job(2, embed(shards, tmp_path / "s"), tmp_path / "printed")[0] == [0, 0]
    assert contents(tmp_path / "s") == undisturbed


def test_a_worker_killed_in_the_middle_of_a_shard(forked, shards, undisturbed, tmp_path):
    def kill(rank):
        read = ImageReader.image

        def dying(self, place):
            if place.location.endswith("000030005.png"):
                os.kill(os.getpid(), signal.SIGKILL)
            return read(self, place)

        ImageReader.image = dying

    work = embed(shards, tmp_path / "s", "--workers", "1", before=kill)
    statuses, printed = forked.run_job(2, work, tmp_path / "printed")
    assert statuses == [2, 2], printed
    (sentence,) = sentences(printed)
    assert "a worker process died" in sentence and "run the same command again" in sentence
    assert "Traceback" not in printed[0] + printed[1]
    assert forked.run_job(2, embed(shards, tmp_path / "s"), tmp_path / "printed")[0] == [0, 0]
    assert contents(tmp_path / "s") == undisturbed


class FullDisk(io.FileIO):
    """A file on a disk with `left` bytes for all of them together."""

    left = 0

    def write(self, content):
        size = memoryview(content).nbytes
        FullDisk.left -= size
        if FullDisk.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(content)


def test_a_full_disk_at_any_byte(shards, undisturbed, tmp_path, monkeypatch):
    """Index, plan, parts, all files of the store, manifest: a run that stops there, and resumes with some more disk
    space."""
    backbone, model = load_backbone("random-tiny"), load_sentence_model("hash:16")
    fdopen, stages = os.fdopen, set()

    def opened(handle, mode, encoding=None):
        if mode not in ("wb", "w"):
            return fdopen(handle, mode, encoding=encoding)
        raw = io.BufferedWriter(FullDisk(handle, "wb"))
        return raw if mode == "wb" else io.TextIOWrapper(raw, encoding=encoding)

    monkeypatch.setattr(files.os, "fdopen", opened)
    space = 300
    for _ in range(100):
        FullDisk.left = space
        try:
            embed_pairs(shards, tmp_path / "s", backbone, model, batch_size=4, part_size=5)
            break
        except GramError as error:
            assert "cannot be written (No space left on device); free some space and run the same command again" in str(
                error
            )
        there = {path.name for path in (tmp_path / "s").rglob("*") if path.is_file()}
        assert not [name for name in there if name.endswith(".part")]
        stages.add(frozenset(name.rstrip("0123456789") for name in there))
        space = space * 9 // 8
    joining = [stage for stage in stages if "image_features.npy" in stage and "similarity.npy" not in stage]
    assert len(stages) > 12 and joining, stages
    assert contents(tmp_path / "s") == undisturbed


@pytest.mark.parametrize("stage", ["index", "part", "join"])
def test_a_full_disk_of_one_process_of_several(forked, shards, undisturbed, tmp_path, stage):
    def fill(rank):
        replace = os.replace

        def full(here, there):
            name = str(there)
            if (stage == "index" and "index/000003.parquet" in name) or (
                name.endswith({"part": "000007.npz", "join": "similarity.npy"}.get(stage, "-"))
            ):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            replace(here, there)

        os.replace = full

    for workers in ("0", "1"):
        work = embed(shards, tmp_path / "s", "--workers", workers, before=fill)
        statuses, printed = forked.run_job(2, work, tmp_path / "printed")
        assert statuses == [2, 2], printed
        assert len(sentences(printed)) == 1 and "cannot be written (No space left on device)" in sentences(printed)[0]
        assert "Traceback" not in printed[0] + printed[1]
    assert forked.run_job(2, embed(shards, tmp_path / "s"), tmp_path / "printed")[0] == [0, 0]
    assert contents(tmp_path / "s") == undisturbed


def test_sigterm_anywhere(forked, shards, undisturbed, tmp_path):
    """Two processes get SIGTERM after ever longer times, until they finish."""
    slow_join = embedding.join_parts

    def prepare(rank):
        slowly(0.005)

        def join(*args):
            replace = os.replace

            def late(here, there):
                time.sleep(0.02)
                replace(here, there)
                time.sleep(0.02)

            os.replace = late
            slow_join(*args)

        embedding.join_parts = join

    out, ended, seen = tmp_path / "s", False, set()
    for attempt in range(60):
        job = forked.Job(2, embed(shards, out, "--workers", str(attempt % 2), before=prepare), tmp_path / "printed")
        manifest = out / "manifest.json"
        wait_until(lambda path=manifest: path.exists(), "no manifest")
        time.sleep(0.06 * attempt)
        job.send(signal.SIGTERM)
        ended = job.wait() == [0, 0]
        # a dying image worker of torch may have its say, our code has none
        assert "gram_meta" not in "".join(job.printed())
        seen |= {path.name.rstrip("0123456789") for path in out.rglob("*") if path.is_file()}
        if ended:
            break
    (out / locks.LOCK).unlink(missing_ok=True)  # of a job that got the signal when its store was finished; it is free
    assert ended and contents(out) == undisturbed
    assert {"plan.json", "000000.npz", "000011.npz"} <= seen


def test_a_second_run_is_refused_quickly(forked, shards, undisturbed, tmp_path, monkeypatch):
    """By all of its processes and in one sentence, while the first job is at work; that one is not disturbed."""
    monkeypatch.setattr(locks, "WAIT", 0.1)
    out = tmp_path / "s"
    job = forked.Job(2, embed(shards, out, before=lambda rank: slowly(0.05)), tmp_path / "printed")
    wait_until(lambda: parts_of(out) >= 1, job.printed())
    start = time.monotonic()
    for size in (1, 2):
        statuses, printed = forked.run_job(size, embed(shards, out), tmp_path / "second")
        assert statuses == [2] * size
        (sentence,) = sentences(printed)
        assert "another run is writing to this folder" in sentence and "Traceback" not in "".join(printed)
    assert time.monotonic() < start + 20
    assert job.wait() == [0, 0]
    assert contents(out) == undisturbed


def test_torchrun_and_a_killed_process_of_it(forked, shards, undisturbed, tmp_path):
    """The real launcher: one of two processes is killed, torchrun ends the other; the command given again finishes."""
    out, script = tmp_path / "s", tmp_path / "slow.py"
    script.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from gram_meta.corpus.places import ImageReader\n"
        "from gram_meta.cli import main\n"
        f"Path(r'{tmp_path}', os.environ['RANK'] + '.pid').write_text(str(os.getpid()))\n"
        "read = ImageReader.image\n"
        "def slow(self, place): time.sleep(0.2 if '--slow' in sys.argv else 0); return read(self, place)\n"
        "ImageReader.image = slow\n"
        "sys.exit(main([word for word in sys.argv[1:] if word != '--slow']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def torchrun(*options):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        with open(tmp_path / "printed.txt", "w") as printed:
            return subprocess.Popen(
                [*launcher, str(script), *command(shards, out), *options],
                env=environment,
                stdout=printed,
                stderr=subprocess.STDOUT,
            )

    process = torchrun("--slow")
    printed = tmp_path / "printed.txt"
    try:
        wait_until(lambda: parts_of(out) >= 2 or process.poll() is not None, printed.read_text(), 400)
        os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGKILL)
        assert process.wait(100) != 0, printed.read_text()
    finally:
        process.kill()
        process.wait()
    assert 2 <= parts_of(out) < 12
    assert "gram_meta" not in printed.read_text(), "a traceback of ours"
    assert torchrun().wait(400) == 0, printed.read_text()
    assert contents(out) == undisturbed
