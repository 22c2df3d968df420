"""gram bench: the matrix and its folders, and a loop that skips, goes on, reports and can be stopped."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from gram_meta.bench import emoji, matrix, pool, runner
from gram_meta.bench.matrix import BenchRun, BenchSettings
from gram_meta.cli import main
from gram_meta.config import as_dict, load_meta_config
from gram_meta.errors import GramError
from gram_meta.files import MARK, sha256_file

COOP = "gram_small_c4_ep10_batch32_ctxv1"


def settings(output, *trainers, **changes):
    plain = dict(
        protocols=("base2new",),
        trainers=trainers,
        backbone="gram_small",
        root="data",
        output=Path(output),
        datasets={"base2new": ("emoji_food", "emoji_travel"), "xd": ("emoji_food",), "dg": ("emoji_objects",)},
        source="emoji_travel",
        seeds=(1, 2),
        shots=1,
        meta_dir=Path(output, "meta"),
    )
    return BenchSettings(**{**plain, **changes})


def names(jobs, output):
    return [job.folder.relative_to(output).as_posix() for job in jobs]


def option(job, key):
    return job.argv[job.argv.index(key) + 1]


# ------------------------------------------------------------------------------------------------------------- matrix


def test_base2new_seed_by_seed_each_training_before_its_test():
    jobs = matrix.bench_runs(settings("out", "ZeroshotCLIP", "CoOp"))
    tails = [
        f"{dataset}/shots_1/{trainer}/{config}/seed{seed}"
        for seed in (1, 2)
        for dataset in ("emoji_food", "emoji_travel")
        for trainer, config in (("ZeroshotCLIP", "gram_small"), ("CoOp", COOP))
        if trainer == "CoOp" or seed == 1  # nothing in zero-shot depends on the seed
    ]
    assert names(jobs, "out/base2new") == [f"{part}/{tail}" for tail in tails for part in ("train_base", "test_new")]
    for trained, tested in zip(jobs[::2], jobs[1::2], strict=True):
        assert option(trained, "DATASET.SUBSAMPLE_CLASSES") == "base"
        assert option(tested, "DATASET.SUBSAMPLE_CLASSES") == "new"
        zero_shot = "ZeroshotCLIP" in tested.argv
        assert ("--eval-only" in trained.argv) == zero_shot and "--eval-only" in tested.argv
        assert ("--model-dir" in tested.argv) != zero_shot
        if not zero_shot:
            assert option(tested, "--model-dir") == str(trained.folder) and trained.folder in tested.after


def test_xd_and_dg_share_the_model_of_the_source():
    jobs = matrix.bench_runs(settings("out", "CoOp", protocols=("xd", "dg"), seeds=(7,), shots=4))
    source = f"emoji_travel/CoOp/{COOP}_4shots/seed7"
    targets = [f"evaluation/CoOp/{COOP}_4shots/{target}/seed7" for target in ("emoji_food", "emoji_objects")]
    assert names(jobs, "out") == [source, *targets]
    assert "DATASET.SUBSAMPLE_CLASSES" not in jobs[0].argv and option(jobs[0], "DATASET.NUM_SHOTS") == "4"
    assert all(option(job, "--model-dir") == f"out/{source}" for job in jobs[1:])


def test_defaults_are_the_papers():
    assert len(matrix.DATASETS["base2new"]) == 11 and len(matrix.DATASETS["xd"]) == 10
    assert set(matrix.DATASETS["xd"]) == set(matrix.DATASETS["base2new"]) - {"imagenet"}
    for name in {name for names in matrix.DATASETS.values() for name in names}:
        assert matrix.find_config(name, "datasets").is_file()
    for trainer, config in matrix.CONFIGS.items():
        for backbone in matrix.BACKBONES:
            matrix.find_config(config.format(bb=backbone), f"trainers/{trainer}")


def test_another_config_and_options_of_all_runs():
    (job, *_) = matrix.bench_runs(settings("out", "UniGRAM:gram_small_c1+1_ep10_batch32_ctxv1", "CoOp", **given("out")))
    assert job.argv[0] == "pretrain" and job.folder == Path("out/meta/unigram_gram_small_c1+1")
    jobs = matrix.bench_runs(settings("out", f"CoOp:{COOP}", opts=("OPTIM.LR", "0.1")))
    assert jobs[0].title.startswith("CoOp, ") and jobs[0].argv[-2:] == ("OPTIM.LR", "0.1")


def test_two_configs_of_one_name_are_refused(tmp_path):
    """The second one would not run, as both have the same folders."""
    texts = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.yaml").write_text("OPTIM:\n  LR: 0.1\n")
        texts.append(f"CoOp:{tmp_path / folder / 'x.yaml'}")
    with pytest.raises(GramError, match=f"configs of different names, .* found {texts[0]} and {texts[1]}"):
        matrix.bench_runs(settings("out", *texts))
    same = matrix.bench_runs(settings("out", "CoOp", f"CoOp:{COOP}", f"CoOp:configs/trainers/CoOp/{COOP}.yaml"))
    assert len(same) == len(matrix.bench_runs(settings("out", "CoOp")))
    assert matrix.bench_runs(settings("out", texts[0], "CoOp"))


def given(output, what=("store", "hierarchy")):
    return {name: f"{output}/{name}" for name in what}


def test_meta_trainings_come_first_and_once():
    trainers = ("CoOp", "CoOpGRAM", "UniGRAM", "UniGRAM:gram_small_c2+2_ep10_batch32_ctxv1_no_regulator")
    jobs = matrix.bench_runs(settings("out", *trainers, **given("out"), meta_opts=("OUTER.STEPS", "5")))
    metas = ["coop_gram_small", "unigram_gram_small", "unigram_gram_small_no_regulator"]
    assert names(jobs, "out")[:3] == [f"meta/{name}" for name in metas]
    assert Counter(job.argv[0] for job in jobs) == {"pretrain": 3, "train": 2 * 2 * 2 * 4}
    assert jobs[0].argv[-2:] == ("OUTER.STEPS", "5") and option(jobs[0], "--store") == "out/store"
    for job in jobs[3:]:
        if "TRAINER.GRAM.CHECKPOINT" in job.argv:
            folder = Path(option(job, "TRAINER.GRAM.CHECKPOINT")).parent
            assert folder in job.after and folder.name in metas
    labelled = "UniGRAM:gram_small_c2+2_ep10_batch32_ctxv1_labelled"
    (meta, *_) = matrix.bench_runs(settings("out", labelled, **given("out", ("labelled_store", "labelled_hierarchy"))))
    assert option(meta, "--store") == "out/labelled_store"


def test_a_missing_checkpoint_is_one_sentence(tmp_path):
    with pytest.raises(GramError) as error:
        matrix.bench_runs(settings(tmp_path, "CoOpGRAM"))
    folder = tmp_path / "meta" / "coop_gram_small"
    assert str(error.value) == (
        f"{folder}/best.safetensors: expected the meta-checkpoint for CoOpGRAM, found no such file; make it with "
        f"`{shlex.join(['gram', 'pretrain', '--store', 'STORE', '--hierarchy', 'HIERARCHY', '--config'])} "
        f"configs/gram_meta/coop_gram_small.yaml -o {shlex.quote(str(folder))}`, or give --store and --hierarchy"
    )
    folder.mkdir(parents=True)
    (folder / "best.safetensors").touch()  # a copy: nothing beside it
    assert matrix.bench_runs(settings(tmp_path, "CoOpGRAM"))
    (folder / "run.json").write_text(json.dumps({"config": {"OUTER": {"STEPS": 600}}}))
    (folder / "log.jsonl").write_text('{"step": 0}\n{"step": 5}\n')
    with pytest.raises(GramError, match="not finished; go on with `gram pretrain --resume"):
        matrix.bench_runs(settings(tmp_path, "CoOpGRAM"))
    (folder / "log.jsonl").write_text('{"step": 0}\n{"step": 600}\n')
    assert matrix.meta_state(folder) == "finished"
    with pytest.raises(GramError, match="holds a meta-training with OUTER.STEPS 600, expected 8; .*--meta-dir"):
        matrix.meta_state(folder, ("OUTER.STEPS", "8"))
    assert matrix.meta_state(folder, ("LOADER.WORKERS", "8")) == "finished"
    (folder / "run.json").write_text(json.dumps({"config": {"OUTER": {"STEPS": 600}, "TASKS": {"WAYS": 3}}}))
    with pytest.raises(GramError, match="holds a meta-training with TASKS.WAYS 3, expected 10"):
        matrix.meta_state(folder)  # the config file has changed since
    (folder / "run.json").write_text(json.dumps({"config": {"OUTER": {"STEPS": 600}}}))
    jobs = matrix.bench_runs(settings(tmp_path, "CoOpGRAM", opts=("TRAINER.GRAM.CHECKPOINT", "mine.safetensors")))
    assert {job.argv[0] for job in jobs} == {"train"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--trainers CoOpGRAN --root .", "--trainers CoOpGRAN: expected a trainer .* did you mean 'CoOpGRAM'"),
        ("--trainers CoOp:vit_b16_c5 --root .", "vit_b16_c5: expected a YAML file, .* did you mean 'trainers/"),
        ("--trainers CoOp --datasets emoji_fod --root .", "emoji_fod: expected .* did you mean 'datasets/emoji_food'"),
        ("--trainers CoOp --seeds 1 1 --root .", "--seeds: expected different numbers from 0 on, found 1 1"),
        ("--trainers CoOp --seeds one --root .", "--seeds: expected numbers from 0 on, found 'one'"),
        ("--trainers CoOp --root . --seeds OPTIM.LR 0.1", "--seeds: expected a value, found OPTIM.LR"),
        ("--trainers CoOp --shots 0 --root .", "--shots: expected a number from 1 on, found 0"),
        ("--trainers CoOp --jobs 0 --root .", "--jobs: expected at least 1 and at most 512, found 0"),
        ("--trainers CoOp", "--root: expected the folder of the datasets"),
        ("--trainers CoOp --root nowhere", "--root nowhere: expected the folder"),
        ("--trainers CoOp --store s --root .", "--store and --hierarchy belong together"),
        ("--protocol xd dg --datasets dtd --trainers CoOp --root .", "--datasets: expected one protocol"),
        ("--emoji d --root . --trainers CoOp", "--root and --emoji: expected one of them"),
        ("--emoji d --datasets dtd --trainers CoOp", "dtd: expected a dataset of the emoji world"),
    ],
)
def test_bad_input_is_one_sentence(words, says, capsys):
    assert main(["bench", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gram bench: ")
    assert re.search(says, line), line


def test_options_right_after_a_list_belong_to_no_list(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        runner, "run", lambda jobs, settings, places, part: seen.update(s=settings, n=len(places)) or part
    )
    words = "bench --root . --trainers CoOp --datasets dtd OPTIM.LR 0.1 --gpus 0 1 --seeds 5 OPTIM.MAX_EPOCH 2"
    assert main(words.split()) == 0
    assert sorted(seen["s"].opts) == ["0.1", "2", "OPTIM.LR", "OPTIM.MAX_EPOCH"] and seen["n"] == 2
    assert seen["s"].seeds == (5,) and seen["s"].datasets == {"base2new": ("dtd",)}


def test_places(monkeypatch):
    monkeypatch.setattr(pool, "cores", lambda: 7)
    for name in pool.THREADS:
        monkeypatch.delenv(name, raising=False)
    assert [place["OMP_NUM_THREADS"] for place in pool.places(3)] == ["2"] * 3
    assert [place["CUDA_VISIBLE_DEVICES"] for place in pool.places(1, ["3", "1"])] == ["3", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert pool.places(1)[0]["OMP_NUM_THREADS"] == "5" and "CUDA_VISIBLE_DEVICES" not in pool.places(1)[0]


# -------------------------------------------------------------------------------------------------------- emoji world


MADE = json.dumps({"size": 77, "recipe": emoji.RECIPE})


def emoji_jobs(folder, *words):
    import argparse

    from gram_meta.commands.bench import add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    chosen = emoji.settings(parser.parse_args(["--emoji", str(folder), *words]))
    return chosen, emoji.bench_runs(chosen, folder)


def test_the_emoji_world_is_made_first(tmp_path):
    labelled = "UniGRAM:gram_small_c2+2_ep10_batch32_ctxv1_labelled"
    chosen, jobs = emoji_jobs(tmp_path, "--trainers", "CoOpGRAM", labelled, "--seeds", "1")
    kinds = [job.argv[0] for job in jobs]
    assert kinds[:8] == ["python", "embed", "cluster", "python", "embed", "cluster", "pretrain", "pretrain"]
    assert len(jobs) == 8 + 2 * 5 * 2 and chosen.root == str(tmp_path / "world")
    made = {job.folder for job in jobs}
    for job in jobs[1:]:  # each stands on something made here
        assert made & set(job.after), job.title
    assert option(jobs[7], "--hierarchy") == str(tmp_path / "labelled_hierarchy")
    _, jobs = emoji_jobs(tmp_path, "--trainers", "CoOp", "--protocol", "dg", "--seeds", "1")
    assert [job.argv[0] for job in jobs] == ["python"] + ["train"] * 4  # no corpus without a meta-training
    assert '["travel", "travel_shift"], corpus_size=0' in jobs[0].argv[2]
    (tmp_path / "world" / "corpus").mkdir(parents=True)
    (tmp_path / "world" / "corpus" / "manifest.json").write_text(MADE)  # a corpus that is there stays
    _, jobs = emoji_jobs(tmp_path, "--trainers", "CoOpGRAM", "--seeds", "1")
    assert "corpus_size=77" in jobs[0].argv[2]
    _, jobs = emoji_jobs(tmp_path, "--trainers", "CoOpGRAM", "--store", "s", "--hierarchy", "h", "--seeds", "1")
    made = {job.folder for job in jobs if job.argv[0] != "train"}
    assert {Path("s"), Path("h")} <= made  # at the named place, and only what does not exist


def test_the_corpus_as_class_folders(tmp_path):
    images = tmp_path / "world" / "corpus" / "images"
    images.mkdir(parents=True)
    for name in ("0.png", "1.png", "2.png"):
        (images / name).write_bytes(name.encode())
    rows = [
        "image\tconcept\tstyle",
        "images/0.png\tred apple\tgrey",
        "images/1.png\tA/B\tgrey",
        "images/2.png\tred apple\tflat",
    ]
    (tmp_path / "world" / "corpus" / "truth.tsv").write_text("\n".join(rows) + "\n")
    for _ in range(2):
        folder = emoji.write_labelled(tmp_path / "world", tmp_path / "labelled")
        found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
        assert found == ["A-B/1.png", "red_apple/0.png", "red_apple/2.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labelled", "world"]
    (folder / MARK).unlink()
    with pytest.raises(GramError, match="labelled: expected nothing there, or what this run made, found other files"):
        emoji.write_labelled(tmp_path / "world", folder)
    assert len(list(folder.rglob("*.png"))) == 3


@pytest.mark.parametrize("folder", ["world/corpus", "world/emoji_food", "labelled"])
def test_an_emoji_bench_refuses_other_files(folder, tmp_path):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "thesis.txt").write_text("two years")
    with pytest.raises(GramError, match=f"{folder}: expected nothing there, or what this run made, found other files"):
        emoji_jobs(tmp_path, "--trainers", "UniGRAM:gram_small_c2+2_ep10_batch32_ctxv1_labelled", "CoOpGRAM")
    assert (tmp_path / folder / "thesis.txt").read_text() == "two years"


def write_topics(folder, config="coop_gram_small", **changes):
    """A hierarchy as far as a bench reads it, with the settings of a meta config and these changes of CHC."""
    chc = as_dict(load_meta_config([config]))["CHC"]
    for key, value in changes.items():
        node, _, leaf = key.partition("__")
        chc[node][leaf] = value
    folder.mkdir(parents=True)
    (folder / "topics.json").write_text(json.dumps({"kind": "hierarchy", "config": {"CHC": chc}}))


def test_an_emoji_bench_refuses_a_world_of_another_recipe(tmp_path):
    (tmp_path / "world/emoji_food").mkdir(parents=True)
    (tmp_path / "world/emoji_food/manifest.json").write_text(json.dumps({"recipe": "emoji-world-1"}))
    with pytest.raises(
        GramError, match=f"emoji_food/manifest.json: .* of recipe {emoji.RECIPE}, found 'emoji-world-1'"
    ):
        emoji_jobs(tmp_path, "--trainers", "CoOp")


def test_an_emoji_bench_refuses_what_was_made_of_another_corpus(tmp_path):
    corpus = tmp_path / "world/corpus"
    corpus.mkdir(parents=True)
    (corpus / "manifest.json").write_text(MADE)
    (corpus / "pairs.tsv").write_text("image\tcaption\n")
    store = {"settings": {"source": {"sha256": sha256_file(corpus / "pairs.tsv")}}, "finished": True}
    (tmp_path / "store").mkdir()
    (tmp_path / "store/manifest.json").write_text(json.dumps(store))
    assert emoji_jobs(tmp_path, "--trainers", "CoOpGRAM")
    (corpus / "pairs.tsv").write_text("image\tcaption\na.png\ta cat\n")
    with pytest.raises(GramError, match="store: expected a store of .*pairs.tsv"):
        emoji_jobs(tmp_path, "--trainers", "CoOpGRAM")
    labelled = "UniGRAM:gram_small_c2+2_ep10_batch32_ctxv1_labelled"
    (corpus / "truth.tsv").write_text("image\tconcept\n")
    emoji.write_labelled(tmp_path / "world", tmp_path / "labelled")
    assert emoji_jobs(tmp_path, "--trainers", labelled)
    (corpus / "truth.tsv").write_text("image\tconcept\nimages/0.png\tcat\n")
    with pytest.raises(GramError, match="labelled: expected nothing there, or what this run made"):
        emoji_jobs(tmp_path, "--trainers", labelled)


@pytest.mark.parametrize(
    ("changes", "opts", "says"),
    [
        ({}, ("CHC.DOMAINS.K", "5"), r"made with CHC.DOMAINS.K \d, expected 5"),
        ({"FILTER__KEEP": 0.3}, (), "made with CHC.FILTER.KEEP 0.3, expected"),  # of another version of the config
    ],
)
def test_an_emoji_bench_refuses_a_hierarchy_of_other_settings(tmp_path, changes, opts, says):
    """It would train on it, and record the settings that were asked for."""
    write_topics(tmp_path / "hierarchy", **changes)
    meta_opts = ("--meta-opts", *opts) if opts else ()
    with pytest.raises(GramError, match=f"hierarchy: holds a hierarchy {says}"):
        emoji_jobs(tmp_path, "--trainers", "CoOpGRAM", *meta_opts)


def test_a_given_hierarchy_has_to_have_the_settings_that_are_asked_for(tmp_path):
    """And no others: any hierarchy may be trained on with any meta config."""
    write_topics(tmp_path / "hierarchy", FILTER__KEEP=0.3, DOMAINS__K=3)
    given_here = given(tmp_path)
    for opts in ((), ("OUTER.STEPS", "5"), ("CHC.DOMAINS.K", "3")):
        assert matrix.bench_runs(settings(tmp_path, "CoOpGRAM", **given_here, meta_opts=opts))
    with pytest.raises(GramError, match="hierarchy: holds a hierarchy made with CHC.DOMAINS.K 3, expected 4"):
        matrix.bench_runs(settings(tmp_path, "CoOpGRAM", **given_here, meta_opts=("CHC.DOMAINS.K", "4")))


def test_a_meta_training_on_another_hierarchy_is_another_one_only_where_that_is_asked_for(tmp_path):
    folder = tmp_path / "coop_gram_small"
    config = as_dict(load_meta_config(["coop_gram_small"], ["CHC.DOMAINS.K", "7"]))
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"config": config}))
    assert matrix.meta_state(folder) == "unfinished"
    assert matrix.meta_state(folder, ("CHC.DOMAINS.K", "7")) == "unfinished"
    with pytest.raises(GramError, match="holds a meta-training with CHC.DOMAINS.K 7, expected 4"):
        matrix.meta_state(folder, ("CHC.DOMAINS.K", "4"))
    with pytest.raises(GramError, match="holds a meta-training with INNER.ALPHA"):
        matrix.meta_state(folder, ("INNER.ALPHA", "0.3"))


# ----------------------------------------------------------------------------------------- the loop, without training


def python_job(folder, code, *after):
    """A job of plain Python, which is finished when `folder` is there."""
    return BenchRun(("python", "-c", code), folder, folder.name, ("python", folder.name), after, leaves=(folder,))


def making(folder):
    return f"import os; os.mkdir({str(folder)!r})"


def bench(jobs, output, workers=1, lines=None):
    lines = [] if lines is None else lines
    status = runner.run(jobs, settings(output, "CoOp"), [{"X_PLACE": str(i)} for i in range(workers)], lines.append)
    return status, "\n".join(lines)


@pytest.mark.slow
def test_a_failing_run_and_a_dying_worker_take_nothing_else_with_them(tmp_path):
    """Jobs that fail, that end their worker, that need these, and good ones, by two workers."""
    out = tmp_path / "out"
    folders = {name: tmp_path / name for name in ("bad", "upon", "above", "killed", "good", "later")}
    bad = "import sys; print('on the way'); sys.exit('what went wrong')"
    kill = "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"
    jobs = [
        python_job(folders["bad"], bad),
        python_job(folders["upon"], making(folders["upon"]), folders["bad"]),
        python_job(folders["above"], making(folders["above"]), folders["upon"]),
        python_job(folders["killed"], kill),
        python_job(folders["good"], making(folders["good"])),
        python_job(folders["later"], making(folders["later"]), folders["good"]),
    ]
    status, text = bench(jobs, out, 2)
    assert status == 1 and folders["good"].is_dir() and folders["later"].is_dir()
    assert not folders["upon"].exists() and not folders["above"].exists()
    log = next(Path(out, "bench_logs").glob("*bad.log"))
    assert f"FAILED bad: what went wrong (log: {log})" in text and "on the way" in log.read_text()
    assert "FAILED killed: the worker process was ended by SIGKILL; perhaps for lack of memory" in text
    assert "4 of 6 runs failed or need one that did" in text
    (entry,) = json.loads((out / "bench.json").read_text())["benches"]
    assert entry["failed"][str(folders["upon"])] == "needs bad, which failed"
    assert entry["finished"] == 2 and entry["ended"] >= entry["started"] and entry["versions"]["torch"]

    jobs[0], jobs[3] = (python_job(folders[name], making(folders[name])) for name in ("bad", "killed"))
    status, text = bench(jobs, out)  # fixed: the rest, and only that
    assert status == 0 and "6 runs in" in text and "2 finished before" in text and "[3/6]" in text
    assert folders["above"].is_dir() and not any(Path(out, "bench_logs").iterdir())
    assert len(json.loads((out / "bench.json").read_text())["benches"]) == 2
    assert "6 finished before" in bench(jobs, out)[1]


def test_workers_stay_and_see_their_environment_from_the_start():
    with pool.Pool([{"X_PLACE": "here", "OMP_NUM_THREADS": "3"}]) as workers:
        first = workers.call(os.getpid)
        assert first != os.getpid() and workers.call(os.getpid) == first
        assert workers.call(os.getenv, "OMP_NUM_THREADS") == "3" and "X_PLACE" not in os.environ
        with pytest.raises(GramError, match="SIGKILL"):
            workers.call(signal.raise_signal, signal.SIGKILL)
        assert workers.call(os.getpid) != first and workers.call(os.getenv, "X_PLACE") == "here"
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_worker_keeps_the_clip_of_its_last_run(tmp_path, monkeypatch):
    from gram_meta.backbone import clip

    monkeypatch.setattr(clip, "keeps_last", False)
    outcome = pool._attempt(pool.Task("one", ("train", "--trainer", "Nobody"), str(tmp_path / "log")))
    assert "Nobody" in outcome.error and clip.keeps_last


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_bench_leaves_no_process_and_goes_on(tmp_path, number):
    """The signal comes while a worker is at a long job that has a process of its own."""
    done, slow, pid = tmp_path / "done", tmp_path / "slow", tmp_path / "pid"
    code = f"import os, time, pathlib; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(100)"
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom pathlib import Path\nfrom gram_meta.bench import runner\n"
        "from gram_meta.bench.matrix import BenchRun, BenchSettings\n"
        "if __name__ == '__main__':\n"
        f"    jobs = [BenchRun(('python', '-c', c), Path(f), f, ('p',), leaves=(Path(f),)) for c, f in "
        f"{[(making(done), str(done)), (code, str(slow))]!r}]\n"
        f"    s = BenchSettings(('base2new',), (), 'gram_small', '.', Path({str(tmp_path / 'out')!r}), {{}})\n"
        "    sys.exit(runner.run(jobs, s, [{}]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(program)],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    until(lambda: pid.exists() and pid.read_text())
    process.send_signal(number)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and text.endswith("interrupted; the same command goes on here\n")
    until(lambda: not alive(int(pid.read_text())))
    assert done.is_dir() and not any((tmp_path / "out" / "bench_logs").iterdir())
    (entry,) = json.loads((tmp_path / "out" / "bench.json").read_text())["benches"]
    assert entry["finished"] == 1 and entry["ended"]
    jobs = [python_job(done, making(done)), python_job(slow, making(slow))]
    status, text = bench(jobs, tmp_path / "out")
    assert status == 0 and "1 finished before" in text and slow.is_dir()


def test_a_worker_ends_with_the_main_process(tmp_path):
    """Killed outright, the main process can end nobody: workers watch it."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, time\nfrom gram_meta.bench.pool import Pool\n"
        "if __name__ == '__main__':\n"
        "    with Pool([{}]) as pool:\n"
        "        print(pool.call(os.getpid), flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    until(lambda: not alive(int(done.stdout)))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return False
    try:  # no /proc on this system
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_time_left():
    clock = runner.Clock(2)
    assert clock.left([("train", "CoOp", "dtd")]) == 0  # nothing is known
    clock.passed(("train", "CoOp", "dtd"), 10)
    clock.passed(("train", "CoOp", "eurosat"), 20)
    clock.passed(("test", "CoOp", "dtd"), 3)
    assert clock.expected(("train", "CoOp", "dtd")) == 10
    assert clock.expected(("train", "CoOp", "ucf101")) == 15
    assert clock.expected(("train", "VPT", "dtd")) == 15
    assert clock.expected(("pretrain", "coop_vit_b16")) == 11
    assert clock.left([("train", "CoOp", "dtd")] * 4) == 20  # two workers
    assert clock.left([("train", "CoOp", "eurosat")]) == 20  # one run is one worker's
    assert clock.left([]) == 0
    assert [runner.in_words(s) for s in (0.2, 89, 200, 9000)] == ["1 s", "89 s", "3 min", "2 h 30 min"]


# ----------------------------------------------------------------------------------------- with real trainings


@pytest.mark.slow
def test_states_of_real_runs(tmp_path, tiny_data, tiny_options, monkeypatch):
    """In this process: what `gram train` says of its folders is what a bench sees."""
    from gram_meta.coop import launch

    chosen = settings(tmp_path, "CoOp", root=str(tiny_data), seeds=(1,), opts=tiny_options)
    jobs = matrix.bench_runs(chosen)

    def states(jobs=jobs, chosen=chosen):
        return [runner.look(jobs, chosen)[job.folder].name for job in jobs]

    assert states() == ["new"] * 4
    launch.train(jobs[0].argv[1:], quiet=True)
    assert states() == ["finished", "new", "new", "new"]
    launch.train(jobs[1].argv[1:], quiet=True)
    assert states() == ["finished", "finished", "new", "new"]
    run = jobs[0].folder / "run.json"
    value = json.loads(run.read_text())
    run.write_text(json.dumps({**value, "finished": False}))
    assert states() == ["unfinished", "unfinished", "new", "new"]
    run.write_text(json.dumps(value))
    other = replace(chosen, opts=(*tiny_options, "OPTIM.LR", "0.5"))
    assert states(matrix.bench_runs(other), other) == ["refused", "unfinished", "new", "new"]
    wrong = replace(chosen, opts=("OPTIM.LRR", "0.5"))
    with pytest.raises(GramError, match="unknown key 'OPTIM.LRR'; did you mean 'OPTIM.LR'"):
        runner.look(matrix.bench_runs(wrong), wrong)


@pytest.mark.slow
def test_the_command(tmp_path, tiny_data, tiny_options, monkeypatch, capsys):
    """A bench by one worker, one of its datasets not there; then the commands that are left, as they can be typed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    command = [
        *("bench", "--trainers", "ZeroshotCLIP", "CoOp", "--datasets", "emoji_food", "emoji_objects", "--seeds", "1"),
        *("--backbone", "gram_small", "--shots", "1", "--root", str(tiny_data), *tiny_options),
    ]
    assert main(command) == 1
    text = capsys.readouterr().out
    assert text.count("FAILED") == 3 and "8 runs in output\n" in text and "tables: gram report output" in text
    tail = f"emoji_food/shots_1/CoOp/{COOP}/seed1"
    for part in ("train_base", "test_new"):
        value = json.loads(Path(f"output/base2new/{part}/{tail}/results.json").read_text())["metrics"]["accuracy"]
        assert f": {value:.1f} (" in text
    assert len(list(Path("output/bench_logs").iterdir())) == 3  # the fourth was not started

    monkeypatch.setattr(pool.Pool, "call", lambda self, function, *arguments: function(*arguments))  # torch is here
    assert main([*command, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("# finished: gram train ") for line in lines] == [True] * 4 + [False] * 4
    from gram_meta.coop import launch

    for line in lines:
        words = shlex.split(line.removeprefix("# finished: "))
        assert words[:2] == ["gram", "train"]
        launch.setup_cfg(launch.build_parser().parse_args(words[2:]))
