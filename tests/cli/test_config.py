"""Settings: defaults, files, overrides, and error messages."""

import importlib

import pytest

from gram_meta import cli
from gram_meta.config import as_dict, did_you_mean, load_meta_config
from gram_meta.errors import GramError
from gram_meta.files import expand_home


def test_files_then_options_override_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("OUTER:\n  STEPS: 7\n  LR_PROMPT: 1\nTASKS: {WAYS: 3}\n")
    config = load_meta_config([tmp_path / "a.yaml"], ["OUTER.STEPS", "9", "TASKS.DOMAIN_SHIFT", "False"])
    assert (config.OUTER.STEPS, config.OUTER.LR_PROMPT, config.TASKS.WAYS) == (9, 1.0, 3)
    assert config.TASKS.DOMAIN_SHIFT is False and config.INNER.STEPS == 1
    assert as_dict(config)["OUTER"]["STEPS"] == 9
    with pytest.raises(AttributeError):
        config.SEED = 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("OUTER: {STEP: 7}", "unknown key 'OUTER.STEP'; did you mean 'OUTER.STEPS'?"),
        ("OTHER: 1", "unknown key 'OTHER'"),
        ("OUTER: {STEPS: many}", "OUTER.STEPS: expected int, found 'many'"),
        ("OUTER: [1", "expected YAML"),
        ("just words", "expected keys and values, found str"),
        ("_BASE_: none.yaml", "_BASE_: expected a YAML file, seen from this one's folder"),
        ("_BASE_: bad.yaml", "that does not build on this one, found 'bad.yaml'"),
        ("_BASE_: [1, 2]", "found [1, 2]"),
    ],
)
def test_mistakes_in_a_file_name_it(tmp_path, text, says):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(GramError) as error:
        load_meta_config([tmp_path / "bad.yaml"])
    assert says in str(error.value) and "bad.yaml" in str(error.value)


def test_a_file_builds_on_others(tmp_path):
    """A file wins over its base, and this over the base's own; paths count from each file's folder."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/far.yaml").write_text("OUTER: {STEPS: 7, BATCH: 3}\nTASKS: {WAYS: 3}")
    (tmp_path / "base/near.yaml").write_text("_BASE_: far.yaml\nOUTER: {STEPS: 8, BATCH: 2}")
    (tmp_path / "a.yaml").write_text("_BASE_: base/near.yaml\nOUTER: {STEPS: 9}")
    config = load_meta_config([tmp_path / "a.yaml"])
    assert (config.OUTER.STEPS, config.OUTER.BATCH, config.TASKS.WAYS) == (9, 2, 3)
    (tmp_path / "base/far.yaml").write_text("_BASE_: ../a.yaml")
    with pytest.raises(GramError, match=r"far.yaml: _BASE_: expected .* found '../a.yaml'"):
        load_meta_config([tmp_path / "a.yaml"])


def test_mistakes_in_options(tmp_path):
    with pytest.raises(GramError, match="without a value"):
        load_meta_config([], ["OUTER.STEPS"])
    with pytest.raises(GramError, match="did you mean 'INNER.ALPHA'"):
        load_meta_config([], ["INNER.ALFA", "1"])
    with pytest.raises(GramError, match="none.yaml: expected a YAML file"):
        load_meta_config([tmp_path / "none.yaml"])


def test_paths_of_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    (tmp_path / "a.yaml").write_text("LOADER: {IMAGE_ROOT: ~/images}\n")
    config = load_meta_config([tmp_path / "a.yaml"], ["BACKBONE.NAME", "~/clip.pt"])
    assert (config.LOADER.IMAGE_ROOT, config.BACKBONE.NAME) == ("/home/ada/images", "/home/ada/clip.pt")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("~/x", "/home/ada/x"),
        ("~", "/home/ada"),
        ("--out=~/x", "--out=/home/ada/x"),
        ("--backbone=~/a b.pt", "--backbone=/home/ada/a b.pt"),
        ("-o~/x", "-o/home/ada/x"),
        ("a~/x", "a~/x"),
        ("/data/~/x", "/data/~/x"),
        ("--without=A~B", "--without=A~B"),
    ],
)
def test_words_of_a_command_line(monkeypatch, word, expected):
    monkeypatch.setenv("HOME", "/home/ada")
    assert expand_home(["KEY", word, 3]) == ["KEY", expected, 3]


COMMANDS = {
    "embed": ["~/in", "--out=~/o", "--backbone=~/c.pt", "--image-root", "~/i"],
    "cluster": ["~/s", "--out=~/o", "--exclude", "~/e.tsv"],
    "inspect": ["~/h", "--html=~/p.html"],
    "check-overlap": ["~/s", "--root=~/d", "-o~/t.tsv"],
    "pretrain": ["--store=~/s", "--hierarchy", "~/h", "-o", "~/o", "--config=~/c.yaml", "BACKBONE.NAME", "~/c.pt"],
    "eval-meta": ["~/m", "--store=~/s", "--hierarchy=~/h"],
    "check-data": ["~/d"],
    "train": ["--root=~/d", "--output-dir", "~/o", "--model-dir=~/m", "TRAINER.GRAM.CHECKPOINT", "~/m"],
    "bench": ["--trainers", "CoOp", "--root=~/d", "--meta-dir=~/m", "--emoji=~/e"],
    "report": ["~/a", "~/b", "--html=~/p.html", "--collect", "~/c.json"],
    "predict": ["--model-dir=~/r", "~/a.jpg", "--out=~/p.csv", "--backbone=~/c.pt"],
    "interpret": ["~/r", "--backbone=~/c.pt"],
    "export": ["~/m", "--output=~/o"],
    "estimate": ["--pairs=9", "--backbone=~/c.pt"],
    "doctor": ["--root=~/d", "--meta", "~/m", "~/n", "--backbone=~/c.pt", "--output-dir=~/o"],
    "demo": ["--out=~/o"],
}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_takes_paths_of_the_home_folder(command, monkeypatch):
    """What `run` gets has no `~` left, and as many home folders as were typed."""
    monkeypatch.setenv("HOME", "/home/ada")
    got = []
    module = importlib.import_module(f"gram_meta.commands.{command.replace('-', '_')}")
    monkeypatch.setattr(module, "run", lambda args: got.append(str({**vars(args), "argv": None})) or 0)
    assert cli.main([command, *COMMANDS[command]]) == 0
    assert "~" not in got[0]
    assert got[0].count("/home/ada/") == sum("~" in word for word in COMMANDS[command])


def test_nearest_says_nothing_when_nothing_is_near():
    assert did_you_mean("xyz", ["CoOp", "CoOpGRAM"]) == ""
    assert did_you_mean("coopgrm", ["CoOp", "CoOpGRAM"]) == "; did you mean 'CoOpGRAM'?"
