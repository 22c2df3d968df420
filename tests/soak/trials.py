"""The trials of the soak. Each takes the world, a name and a random generator, and returns what was lost, or ""."""

from __future__ import annotations

import os
import random
import re
import shutil
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


def kill(world: World, name: str, draw: random.Random) -> str:
    """SIGKILL a command at random moments, one to three times, then let it end."""
    command = world.commands[name]
    with trial_folder(world) as folder:
        out = folder / "out"
        for _ in range(draw.randint(1, 3)):
            had = command.progress(out)
            process = Process(command.argv(out), folder, fresh=command.fresh)
            process.kill_after(draw.uniform(0.02, 1.0) * world.seconds(name))
            if not process.killed:
                break
            if command.progress(out) < had:
                return f"{had} were done before the kill, {command.progress(out)} after it"
        return _ends_well(world, command, out, command.progress(out))


def writers(world: World, name: str, draw: random.Random) -> str:
    """Start a command twice on one folder; sometimes the second has no patience, sometimes the first is killed."""
    command, patient = world.commands[name], draw.random() < 0.6
    with trial_folder(world) as folder:
        out = folder / "out"
        first = Process(command.argv(out), folder, fresh=command.fresh)
        first.process.join(draw.uniform(0, 0.9) * world.seconds(name))
        second = Process(command.argv(out), folder, None if patient else _lose_patience, fresh=command.fresh)
        killed = patient and draw.random() < 0.3
        if killed:
            first.kill_after(draw.uniform(0, 1) * world.seconds(name))
        statuses = [process.wait() for process in (first, second)]
        for process, status in zip((first, second), statuses, strict=True):
            text = process.printed()
            refused = status == 2 and "another run is writing to this folder" in text
            if status != 0 and not refused and not (killed and process is first):
                return f"status {status} of two writers: {text[-600:]}"
            if fault := faults_in(status, text, name):
                return f"{fault} of two writers: {text[-600:]}"
        if all(status != 0 for status in statuses) and not killed:
            return "both writers were refused"
        return _ends_well(world, command, out, command.progress(out))


def disk(world: World, name: str, draw: random.Random) -> str:
    """Run a command on a disk that is too small, then make space."""
    command = world.commands[name]
    with trial_folder(world) as folder, _small_disk(folder, draw.randint(1, command.bytes // PAGE) * PAGE) as grow:
        out = folder / "disk" / "out"
        process = Process(command.argv(out), folder, fresh=command.fresh)
        status = process.wait()
        text = process.printed()
        if status != 0:
            if "no space left" not in text.lower():
                return f"status {status} without the reason: {text[-600:]}"
            if fault := faults_in(status, text, name):
                return f"{fault} on a full disk: {text[-900:]}"
            if left := [path.name for path in out.rglob(".*.part")]:
                return f"half-written files on a full disk: {left}"
        had = command.progress(out)
        grow()
        return _ends_well(world, command, out, had)


def faults_in(status: Status, text: str, name: str) -> str:
    """Return what a command must never print, or ""; a failure is one sentence that begins with the command."""
    if "Traceback" in text:
        return "a traceback"
    if status not in (0, 1, 2, -9):
        return f"status {status}"
    if re.search(r"(?<![\w-])nan(?![\w-])", text, re.IGNORECASE):
        return "nan"
    sentences = len(re.findall(rf"^gram {name}: ", text, re.MULTILINE))
    if status == 2 and sentences != 1:
        return f"{sentences} sentences"
    return ""


def _ends_well(world: World, command: Command, out: Path, had: int) -> str:
    """Run a command to its end; return what differs from the undisturbed run."""
    process = Process(command.argv(out), out.parent, fresh=command.fresh)
    status = process.wait()
    text = process.printed()
    if status != 0 or faults_in(status, text, command.name):
        return f"the same command again: status {status}, {faults_in(status, text, command.name)}: {text[-900:]}"
    if (found := command.resumed(text)) < had:
        return f"{had} were done before, the same command found {found}: {text[:900]}"
    return differences(world.expected(command.name), command.products(out))


def differences(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """Return the names of what two runs do not have in common."""
    names = [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
    kinds = [f"{name} ({'other' if name in found and name in expected else 'extra or missing'})" for name in names]
    return f"not as undisturbed: {', '.join(kinds)}" if kinds else ""


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


def fault(world: World, name: str, draw: random.Random) -> str:
    """Run the test of a fault that users of other programs have reported."""
    tests = Path(__file__).resolve().parents[1]
    argv = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests / FAULTS[name])]
    done = subprocess.run(argv, cwd=tests.parent, capture_output=True, text=True, env={**os.environ})
    return "" if done.returncode == 0 and " passed" in done.stdout else done.stdout[-900:]
