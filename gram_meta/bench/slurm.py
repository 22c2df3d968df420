"""`gram bench --slurm FILE`: a job array of SLURM with the runs that are not finished.

A task of the array is `gram bench --only FOLDERS`, with the other options of the command that wrote the script.
"""

import math
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from gram_meta.bench.matrix import BenchRun, BenchSettings
from gram_meta.bench.pool import Pool, places
from gram_meta.bench.runner import LOGS, look
from gram_meta.errors import GramError, as_gram_error
from gram_meta.files import atomic_write, read_text

MOST = 1001  # tasks of an array: SLURM's MaxArraySize, unless a cluster has set another number
HEAD = "#!/bin/bash\n# Written by `gram bench --slurm`. Submit it with:\n"
SCRIPT = (
    HEAD
    + """\
#   {submit}
{options}

set -eu
cd {here}
case "${{SLURM_ARRAY_TASK_ID:?is not set; sbatch sets it to the number of a task}}" in
{tasks}
*) echo "SLURM_ARRAY_TASK_ID: expected 0 to {last}, found $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;
esac
exec {command} --only "${{runs[@]}}"
"""
)


def write(
    jobs: Sequence[BenchRun], settings: BenchSettings, file: Path, words: Sequence[str], options: str, least: int
) -> None:
    """Write the script of a job array with every run that is not finished; print the command that submits it.

    Args:
        jobs, settings: of the bench.
        file: the script. An existing file is replaced only if this function wrote it.
        words: the command line after `gram`, without the options of the job array.
        options: see `sbatch_options`.
        least: a task gets groups (a training with its tests) until it has this number of runs.

    Raises:
        GramError: `options` are wrong, `file` is another file, or the folder of a run holds another run.
    """
    given = sbatch_options(options)
    if file.exists() and not read_text(file).startswith(HEAD):
        raise GramError(f"--slurm {file}: expected no file, or one that this option has written, found another file")
    with Pool(places(1)) as pool:
        states = pool.call(look, jobs, settings)
    if refused := [state.why for state in states.values() if state.name == "refused"]:
        raise GramError(refused[0] + (f" (and {len(refused) - 1} more such runs)" if refused[1:] else ""))
    todo = {folder for folder, state in states.items() if state.name != "finished"}
    if not todo:
        print(f"all {len(jobs)} runs in {settings.output} are finished: nothing to submit, {file} is not written")
        return
    made, tasks = plan(jobs, todo, least)
    first = len(made) if tasks else 0  # the tasks before this one have to end before the others start
    logs = Path(settings.output, LOGS).absolute()
    with as_gram_error(logs):
        logs.mkdir(parents=True, exist_ok=True)  # SLURM does not make it
    output = str(logs).replace("%", "%%") + "/slurm-%A_%a.log"
    lines = {"job-name": f"={file.stem}", "output": f"={output}", "gres": "=gpu:1", "cpus-per-task": "=8"} | given
    lines["array"] = f"={first}-{len(made + tasks) - 1}{given.get('array', '')[1:]}"
    name = shlex.quote(str(file))
    before = f"--dependency=afterok:$(sbatch --parsable --array=0-{first - 1} {name}) " if first else ""
    submit = f"sbatch {before}{name}"
    with atomic_write(file, "w") as out:
        out.write(script(made + tasks, lines, submit, words))
    print(f"{len(todo)} runs in {len(made + tasks)} tasks: {file}; submit them with `{submit}`")


def sbatch_options(text: str) -> dict[str, str]:
    """Return long options of `sbatch` by name, each with its "=value"; raise `GramError` for other text.

    The text is "partition=gpu time=02:00:00", or the same with "--" before each name. `array=%N` is the number of tasks
    that run at once. An option with an empty value ("gres=") is left out of the script.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise GramError(f"--slurm-options {text}: expected options of sbatch, found {error}") from None
    found = {}
    for word in words:
        match = re.fullmatch(r"(?:--)?([a-z][a-z-]+)(=[^\n]*)?", word)
        if not match:
            raise GramError(f"--slurm-options: expected long options of sbatch, such as partition=gpu, found {word!r}")
        found[match[1]] = match[2] or ""
    if not re.fullmatch(r"(=%[1-9]\d*)?", found.get("array", "")):
        raise GramError("--slurm-options: expected array=%N, for N tasks at once, found array" + found["array"])
    return found


def plan(jobs: Sequence[BenchRun], todo: set[Path], least: int) -> tuple[list[list[BenchRun]], list[list[BenchRun]]]:
    """Return the runs that are `todo` as two lists of tasks: what makes data and meta-checkpoints, then the rest.

    A training and its tests are in one task, in order. Tasks get more than `least` runs if an array would have more
    than `MOST` tasks.
    """
    made = groups(job for job in jobs if job.argv[0] != "train" and job.folder in todo)
    runs = groups(job for job in jobs if job.argv[0] == "train")
    left = [[job for job in group if job.folder in todo] for group in runs]
    least = max(least, math.ceil(sum(map(len, left)) / (MOST - len(made))))
    tasks: list[list[BenchRun]] = []
    for group in filter(None, left):
        if tasks and len(tasks[-1]) < least:
            tasks[-1] += group
        else:
            tasks.append(group)
    return made, tasks


def groups(jobs: Iterable[BenchRun]) -> list[list[BenchRun]]:
    """Return the runs in groups: a run stands in the group of what it needs, after it; it never needs two groups."""
    group_of: dict[Path, list[BenchRun]] = {}
    found: list[list[BenchRun]] = []
    for job in jobs:
        group = next((group_of[folder] for folder in job.after if folder in group_of), None)
        if group is None:
            found.append(group := [])
        group.append(job)
        group_of[job.folder] = group
    return found


def script(tasks: Sequence[Sequence[BenchRun]], options: dict[str, str], submit: str, words: Sequence[str]) -> str:
    """Return the script of an array, whose tasks may be more than its option `array` starts."""
    given = {name: value for name, value in options.items() if value != "="}
    lines = [f"#SBATCH --{name}{value and '=' + shlex.quote(value[1:])}" for name, value in given.items()]
    runs = [shlex.join(str(run.folder) for run in task) for task in tasks]
    gram = Path(sys.executable).with_name("gram")
    program = [str(gram)] if gram.is_file() else [sys.executable, "-m", "gram_meta"]
    return SCRIPT.format(
        submit=submit,
        options="\n".join(lines),
        here=shlex.quote(os.getcwd()),
        tasks="\n".join(f"{number}) runs=({folders}) ;;" for number, folders in enumerate(runs)),
        last=len(tasks) - 1,
        command=shlex.join([*program, *words]),
    )
