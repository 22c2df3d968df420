"""The trials of the soak: functions of the world, a name and a random generator.

Each raises `Lost` where something does not hold, and returns whether the disturbance took effect: whether a process was
killed, waited for another or was refused, met a full disk, or read an edited file.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .processes import Process
from .world import Command, World

Status = int | str
PAGE = 4096


class Lost(Exception):
    """Something that a trial expects does not hold."""


def expect(holds: object, otherwise: str) -> None:
    """Raise `Lost` unless something holds."""
    if not holds:
        raise Lost(otherwise)


def kill(world: World, name: str, draw: random.Random) -> bool:
    """SIGKILL a command at random moments, one to three times, then let it end."""
    command, kills = world.commands[name], 0
    with trial_folder(world) as folder:
        out = folder / "out"
        for _ in range(draw.randint(1, 3)):
            had = command.progress(out)
            process = Process(command.argv(out), folder, fresh=command.fresh)
            process.kill_after(draw.uniform(0.02, 1.0) * world.seconds(name))
            if not process.killed:
                break
            kills += 1
            has = command.progress(out)
            expect(has >= had, f"{had} were done before the kill, {has} after it")
        _ends_well(world, command, out, command.progress(out))
    return kills > 0


def writers(world: World, name: str, draw: random.Random) -> bool:
    """Start a command twice on one folder; sometimes the second has no patience, sometimes the first is killed."""
    command, patient = world.commands[name], draw.random() < 0.6
    with trial_folder(world) as folder:
        out = folder / "out"
        first = Process(command.argv(out), folder, fresh=command.fresh)
        first.join(draw.uniform(0, 0.9) * world.seconds(name))
        second = Process(command.argv(out), folder, None if patient else _lose_patience, fresh=command.fresh)
        killed = patient and draw.random() < 0.3
        if killed:
            first.kill_after(draw.uniform(0, 1) * world.seconds(name))
        statuses = {process: process.wait() for process in (first, second)}
        for process, status in statuses.items():
            text = process.printed()
            refused = status == 2 and "another run is writing to this folder" in text
            fine = status == 0 or refused or (process is first and process.killed)
            expect(fine, f"status {status} of two writers: {text[-600:]}")
            check_output(status, text, name)
        expect(0 in statuses.values() or killed, "both writers were refused")
        _ends_well(world, command, out, command.progress(out))
        return "another run is writing" in second.printed() + first.printed()


def disk(world: World, name: str, draw: random.Random) -> bool:
    """Run a command on a disk that is too small, then make space."""
    command = world.commands[name]
    with trial_folder(world) as folder, _small_disk(folder, draw.randint(1, command.bytes // PAGE) * PAGE) as grow:
        out = folder / "disk" / "out"
        process = Process(command.argv(out), folder, fresh=command.fresh)
        status = process.wait()
        text = process.printed()
        if status != 0:
            expect("no space left" in text.lower(), f"status {status} without the reason: {text[-600:]}")
            check_output(status, text, name)
            left = [path.name for path in out.rglob(".*.part")]
            expect(not left, f"half-written files on a full disk: {left}")
        had = command.progress(out)
        grow()
        _ends_well(world, command, out, had)
    return status != 0


def check_output(status: Status, text: str, name: str) -> None:
    """Raise `Lost` for what a command must never print; bad input is one sentence that begins with the command."""
    end = text[-900:]
    expect("Traceback" not in text, f"a traceback: {end}")
    expect(status in (0, 1, 2, -signal.SIGKILL), f"status {status}: {end}")
    expect(not re.search(r"(?<![\w-])nan(?![\w-])", text, re.IGNORECASE), f"nan: {end}")
    sentences = len(re.findall(rf"^gram {name}: ", text, re.MULTILINE))
    expect(status != 2 or sentences == 1, f"{sentences} sentences: {end}")


def _ends_well(world: World, command: Command, out: Path, had: int) -> None:
    """Run a command to its end; compare with the undisturbed run, and what it found with what was done before."""
    process = Process(command.argv(out), out.parent, fresh=command.fresh)
    status = process.wait()
    text = process.printed()
    expect(status == 0, f"the same command again: status {status}: {text[-900:]}")
    check_output(status, text, command.name)
    found = command.resumed(text)
    expect(found >= had, f"{had} were done before, the same command found {found}: {text[:900]}")
    expect_equal(world, command.name, out)


def expect_equal(world: World, name: str, out: Path) -> None:
    """Raise `Lost` where a folder differs from the undisturbed run of a command."""
    expected, found = world.expected(name), world.commands[name].products(out)
    expect(expected == found, f"not as undisturbed: {', '.join(_differing(expected, found))}")


def _differing(expected: dict[str, Any], found: dict[str, Any], within: str = "") -> Iterator[str]:
    """Yield the keys in which two results differ, and the values if they are short."""
    for key in sorted({*expected, *found}):
        before, now = expected.get(key), found.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differing(before, now, f"{within}{key}: ")
        elif before != now:
            yield f"{within}{key} ({str(before)[:150]} | {str(now)[:150]})"


def _lose_patience() -> None:
    from gram_meta import locks

    locks.WAIT = 0.2


@contextmanager
def trial_folder(world: World) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="trial", dir=world.root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- a small disk ----------------------------------------------------------------------------------------------------


def mounting_fails() -> str:
    """Return why no tmpfs can be mounted here, or ""."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _small_disk(Path(folder), PAGE):
                return ""
        except (OSError, subprocess.CalledProcessError) as error:
            return " ".join((getattr(error, "stderr", "") or str(error)).split())


@contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[Any]:
    """Mount a tmpfs of `size` bytes at folder/disk; yield a function that makes it large."""
    place = folder / "disk"
    place.mkdir()

    def mount(*options: str) -> None:
        subprocess.run(["mount", *options, str(place)], check=True, capture_output=True, text=True)

    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    try:
        yield lambda: mount("-o", "remount,size=256m")
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True, capture_output=True)


# --- reproducers of faults -------------------------------------------------------------------------------------------

FAULTS = {
    "broken image in training": "datasets/test_images.py::test_all_broken_images_are_named_before_training",
    "after removing a broken image": "datasets/test_images.py::test_after_removing_a_broken_image_the_way_on_is_named",
    "contexts of other classes": "trainers/test_trainers.py::test_contexts_of_each_class_know_no_other_classes",
    "deep grey and EXIF in training": "datasets/test_images.py::test_training_sees_what_embed_and_predict_see",
    "keys with dots in tars": "corpus/test_shards.py::test_keys_with_dots_are_paired_or_counted",
    "~ in --out=~/store": "cli/test_config.py::test_every_command_takes_paths_of_the_home_folder",
    "train and valid as classes": "datasets/test_image_folder.py::test_the_usual_names_of_splits_are_no_classes",
    "words of scripts with marks": "clustering/test_chc.py::test_marks_belong_to_words",
}


def fault(world: World, name: str, draw: random.Random) -> bool:
    """Run the test of a fault that users of other programs have reported."""
    tests = Path(__file__).resolve().parents[1]
    argv = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests / FAULTS[name])]
    done = subprocess.run(argv, cwd=tests.parent, capture_output=True, text=True)
    expect(done.returncode == 0 and " passed" in done.stdout, done.stdout[-900:])
    return True
