"""gram bench --slurm: the plan of a job array, and its script, which bash runs without SLURM."""

import os
import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from gram_meta.bench import pool, runner, slurm
from gram_meta.bench.matrix import BenchRun
from gram_meta.cli import main
from gram_meta.commands import bench as command
from gram_meta.locks import only_writer

FINISHED, NEW = runner.State("finished"), runner.State("new")


@pytest.fixture
def write(tmp_path, monkeypatch, capsys):
    """Write the script of a bench in a folder with a space, with states of runs that the test names."""
    here = tmp_path / "my bench"
    (here / "the data").mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setattr(pool.Pool, "call", lambda self, function, *arguments: function(*arguments))
    seen = {}

    def of(*words, finished=lambda job: False, other=NEW, status=0):
        def look(jobs, settings):
            seen["jobs"] = jobs
            return {job.folder: FINISHED if finished(job) else other for job in jobs}

        monkeypatch.setattr(slurm, "look", look)
        argv = ["bench", "--root", "the data", "--output", "out put", "--slurm", "my.sbatch", *words]
        assert main([*argv, "--seeds", "1", "2"]) == status
        text = capsys.readouterr()
        return seen.get("jobs"), text.err if status else text.out

    return of


def tasks(text):
    """Return the folders of each task that a script has."""
    return {int(number): shlex.split(runs) for number, runs in re.findall(r"^(\d+)\) runs=\((.*)\) ;;$", text, re.M)}


def sbatch(text):
    return re.findall(r"^#SBATCH (.*)$", text, re.M)


def test_every_run_is_in_one_task_beside_the_training_that_it_needs(write):
    datasets = ("--datasets", "emoji_food", "emoji_travel")
    jobs, printed = write("--trainers", "ZeroshotCLIP", "CoOp", *datasets)
    text = Path("my.sbatch").read_text()
    found = tasks(text)
    # two zero-shot tests of two datasets, and CoOp with two seeds on two datasets
    assert sorted(found) == list(range(8)) and sorted(map(len, found.values())) == [1] * 4 + [2] * 4
    assert Counter(sum(found.values(), [])) == Counter(str(job.folder) for job in jobs) and len(jobs) == 12
    for job in jobs:
        (task,) = [runs for runs in found.values() if str(job.folder) in runs]
        assert all(task.index(str(f)) < task.index(str(job.folder)) for f in job.after if f in {j.folder for j in jobs})
    assert printed == "12 runs in 8 tasks: my.sbatch; submit them with `sbatch my.sbatch`\n"
    assert text.splitlines()[:3] == ["#!/bin/bash", slurm.HEAD.splitlines()[1], "#   sbatch my.sbatch"]
    log = f"{os.getcwd()}/out put/bench_logs/slurm-%A_%a.log"
    assert sbatch(text) == [
        "--job-name=my",
        f"--output={shlex.quote(log)}",
        *("--gres=gpu:1", "--cpus-per-task=8", "--array=0-7"),
    ]
    assert Path(log).parent.is_dir()  # SLURM does not make it


def test_the_tests_of_one_model_stay_together_and_finished_runs_are_left_out(write):
    words = ("--protocol", "xd", "dg", "--trainers", "CoOp", "--shots", "4")
    jobs, _ = write(*words)
    assert [len(runs) for runs in tasks(Path("my.sbatch").read_text()).values()] == [1 + 10 + 4] * 2
    done = {jobs[0].folder, jobs[1].folder}  # both runs of seed 1: the training, the first test
    _, printed = write(*words, finished=lambda job: job.folder in done)
    found = tasks(Path("my.sbatch").read_text())
    assert [len(runs) for runs in found.values()] == [13, 15] and printed.startswith("28 runs in 2 tasks: ")
    assert not {str(folder) for folder in done} & set(sum(found.values(), []))


def test_nothing_to_do_writes_nothing(write):
    _, printed = write("--trainers", "CoOp", "--datasets", "emoji_food", finished=lambda job: True)
    assert printed == "all 4 runs in out put are finished: nothing to submit, my.sbatch is not written\n"
    assert not Path("my.sbatch").exists() and not Path("out put").exists()


def test_meta_trainings_are_tasks_that_end_first(write):
    words = ("--trainers", "CoOpGRAM", "UniGRAM", "--datasets", "emoji_food", "--backbone", "gram_small")
    store = ("--store", "the store", "--hierarchy", "the hierarchy")
    _, printed = write(*words, *store)
    text = Path("my.sbatch").read_text()
    found = tasks(text)
    assert found[0] == ["out put/meta/coop_gram_small"] and found[1] == ["out put/meta/unigram_gram_small"]
    submit = "sbatch --dependency=afterok:$(sbatch --parsable --array=0-1 my.sbatch) my.sbatch"
    assert len(found) == 6 and sbatch(text)[-1] == "--array=2-5" and f"#   {submit}\n" in text
    assert printed == f"10 runs in 6 tasks: my.sbatch; submit them with `{submit}`\n"
    _, printed = write(*words, *store, finished=lambda job: job.argv[0] == "pretrain")
    assert sbatch(Path("my.sbatch").read_text())[-1] == "--array=0-3" and printed.endswith("`sbatch my.sbatch`\n")
    _, printed = write(*words, *store, "--only", "out put/meta/coop_gram_small")
    assert sbatch(Path("my.sbatch").read_text())[-1] == "--array=0-0" and printed.endswith("`sbatch my.sbatch`\n")


def test_options_of_sbatch_and_more_runs_in_a_task(write):
    options = "--partition=gpu time=02:00:00 exclusive gres= comment='a b' array=%3"
    words = ("--trainers", "CoOp", "--datasets", "emoji_food", "emoji_travel", "--slurm-options", options)
    write(*words, "--runs-per-task", "3", "OPTIM.LR", "0.1")
    text = Path("my.sbatch").read_text()
    assert [len(runs) for runs in tasks(text).values()] == [4, 4]
    assert sbatch(text)[2:] == [
        *("--cpus-per-task=8", "--partition=gpu", "--time=02:00:00", "--exclusive", "--comment='a b'", "--array=0-1%3")
    ]
    last = shlex.split(text.splitlines()[-1])
    end = ["--seeds", "1", "2", "--only", "${runs[@]}"]
    assert last[0] == "exec" and last[-len(end) :] == end and "OPTIM.LR" in last
    assert not any("slurm" in word or word == "--runs-per-task" for word in last[2:])
    assert last[last.index("--root") + 1] == "the data"


def test_an_array_has_no_more_tasks_than_slurm_allows():
    jobs = [BenchRun(("train",), Path(str(i)), str(i), ()) for i in range(5000)]
    _, found = slurm.plan(jobs, {job.folder for job in jobs}, 1)
    assert len(found) <= 1001 and sum(found, []) == jobs and {len(task) for task in found} == {5}
    meta = BenchRun(("pretrain",), Path("meta"), "meta", ())
    (first,), found = slurm.plan([meta, *jobs[:1001]], {job.folder for job in (meta, *jobs)}, 1)
    assert first == [meta] and len(found) == 501  # 1001 tasks and the meta-training would be one too many
    assert len(slurm.plan(jobs[:1001], {job.folder for job in jobs}, 1)[1]) == 1001


def test_only_our_own_file_is_replaced(write):
    words = ("--trainers", "CoOp", "--datasets", "emoji_food")
    Path("my.sbatch").write_text("#!/bin/bash\n#SBATCH --array=0-9\n")
    _, printed = write(*words, status=2)
    assert printed == (
        "gram bench: --slurm my.sbatch: expected no file, or one that this option has written, found another file\n"
    )
    assert Path("my.sbatch").read_text() == "#!/bin/bash\n#SBATCH --array=0-9\n" and not Path("out put").exists()
    Path("my.sbatch").unlink()
    write(*words)
    write(*words, "--runs-per-task", "4")
    assert len(tasks(Path("my.sbatch").read_text())) == 1


def test_a_folder_with_another_run_is_named_before_anything_is_written(write):
    refused = runner.State("refused", "out put/x: holds another run")
    _, printed = write("--trainers", "CoOp", "--datasets", "emoji_food", other=refused, status=2)
    assert printed == "gram bench: out put/x: holds another run (and 3 more such runs)\n"
    assert not Path("my.sbatch").exists() and not Path("out put").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--slurm f --dry-run", "--slurm and --dry-run: expected one of them, found both"),
        ("--slurm f --jobs 2", "argument --jobs: not allowed with argument --slurm"),
        ("--slurm f --gpus 0 1", "argument --gpus: not allowed with argument --slurm"),
        ("--runs-per-task 2", "--runs-per-task: expected --slurm FILE beside it, found none"),
        ("--slurm-options gres=", "--slurm-options: expected --slurm FILE beside it, found none"),
        ("--slurm f --runs-per-task 0", "--runs-per-task: expected .*at least 1.*, found 0"),
        ("--slurm f --slurm-options=-p", "--slurm-options: expected long options of sbatch, .* found '-p'"),
        ("--slurm f --slurm-options=array=0-9", "--slurm-options: expected array=%N, .* found array=0-9"),
        ("--slurm f --slurm-options=time='1", "--slurm-options time='1: expected .* No closing quotation"),
        ("--only out", "--only out: expected the folder of a run of this bench, found another"),
    ],
)
def test_bad_input_is_one_sentence(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["bench", "--trainers", "CoOp", "--root", ".", *words.split()])
    except SystemExit as end:  # argparse
        status = end.code
    line = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and line.startswith("gram bench: ") and re.search(says, line), line
    assert not any(tmp_path.iterdir())


def test_the_command_of_a_task_has_all_but_the_options_of_the_array():
    words = ["bench", "--trainers", "CoOp:a", "--slurm=f f", "--root", "my data", "--runs-per-task", "3"]
    tail = ["--slurm-options", "--partition=gpu --time=1", "--seeds", "1", "OPTIM.LR", "0.1"]
    assert command.without_slurm([*words, *tail]) == [*words[:3], *words[4:6], *tail[2:]]


@pytest.mark.slow
def test_bash_runs_a_task(tmp_path, tiny_data, tiny_options, monkeypatch, capsys):
    """One task after the other: each runs its runs alone; the command again then writes what is left."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(pool.Pool, "call", lambda self, function, *arguments: function(*arguments))  # torch is here
    here = tmp_path / "a folder"
    here.mkdir()
    monkeypatch.chdir(here)
    words = [
        *("bench", "--trainers", "ZeroshotCLIP", "CoOp", "--datasets", "emoji_food", "--seeds", "1"),
        *("--backbone", "gram_small", "--shots", "1", "--root", str(tiny_data), *tiny_options),
        *("--output", "out put", "--slurm", "scripts/my array.sbatch"),
    ]
    assert main(words) == 0
    assert "4 runs in 3 tasks: scripts/my array.sbatch; submit them with `sbatch 'scripts/" in capsys.readouterr().out

    def task(number):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": number}
        return subprocess.run(
            ["bash", str(here / "scripts/my array.sbatch")], env=environment, cwd="/", capture_output=True, text=True
        )

    assert "expected 0 to 2, found 3" in task("3").stderr and "is not set" in task("").stderr
    with only_writer("out put"):  # as another bench would
        done = task("2")
    assert done.returncode == 0 and done.stdout.startswith("2 runs in out put\n"), done.stderr
    found = sorted(path.relative_to(here / "out put").as_posix() for path in here.rglob("results.json"))
    tail = "emoji_food/shots_1/CoOp/gram_small_c4_ep10_batch32_ctxv1/seed1/results.json"
    assert found == [f"base2new/{part}/{tail}" for part in ("test_new", "train_base")]
    assert not (here / "out put/bench.json").exists()  # tasks that run at once would overwrite each other's
    assert main(words) == 0
    assert "2 runs in 2 tasks" in capsys.readouterr().out
    assert "CoOp" not in "".join(sum(tasks(Path(words[-1]).read_text()).values(), []))
