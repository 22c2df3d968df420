"""`gram doctor` in environments that are broken in the ways in which they break."""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

from gram_meta.cli import main
from gram_meta.tools import doctor
from gram_meta.tools.doctor import FINE, NOTE, PROBLEM, Check, Environment, can_run, examine, satisfies

ROOT = Path(__file__).resolve().parents[2]


def run(check, **asked):
    """One check alone; what it says, by name."""
    environment = Environment(**asked)
    return list(check(environment))


def only(checks, name):
    (found,) = [check for check in checks if check.name == name]
    return found


def shadowed(tmp_path, files, *arguments, **environment):
    """Run `gram doctor --format json` with these files first on the path; return (status, checks by name, stderr)."""
    for name, text in files.items():
        (tmp_path / "first" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "first" / name).write_text(text)
    code = "import sys; from gram_meta.cli import main; sys.exit(main(['doctor', '--format', 'json', *sys.argv[1:]]))"
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "cwd").mkdir(exist_ok=True)
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "first"), str(ROOT)]),
        "HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path / "cwd",
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["can_run"] == (done.returncode == 0)
    checks = {}
    for check in report["checks"]:
        checks.setdefault(check["name"], []).append(Check(**check))
        assert check["state"] != PROBLEM or check["fix"], f"no fix for: {check}"
    return done.returncode, checks, done.stderr


# ------------------------------------------------------------------------------------------------------ a sound machine


@pytest.mark.slow
def test_here_it_can_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.endswith("CoOpGRAM can run here.\n") and "problem" not in text.split()
    assert "trains a regulated step and evaluates" in text
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_every_check_has_its_place():
    named = {name for name, value in vars(doctor).items() if name.startswith("check_") and callable(value)}
    assert {check.__name__ for _, check, _ in doctor.CHECKS} == named


# ------------------------------------------------------------------------ whatever is broken ends in a line (processes)


@pytest.mark.slow
def test_without_torch_it_still_starts(tmp_path):
    text = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
    status, checks, _ = shadowed(tmp_path, {"torch/__init__.py": text}, "--root", ".", "--meta", "x", "--backbone", "y")
    assert status == 1
    (torch,) = checks["torch"]
    assert (torch.state, torch.found) == (PROBLEM, "not installed")
    assert torch.fix.endswith(" torch torchvision")
    assert checks["CoOpGRAM"][0].found == "not tried, because of the problems above"


@pytest.mark.slow
def test_a_torch_that_does_not_load_is_installed_anew(tmp_path):
    text = "raise OSError('libcudart.so.13: cannot open shared object file')"
    status, checks, _ = shadowed(tmp_path, {"torch/__init__.py": text})
    assert status == 1
    assert checks["torch"][0].found == "does not import: OSError: libcudart.so.13: cannot open shared object file"
    assert "--force-reinstall" in checks["torch"][0].fix or "--reinstall" in checks["torch"][0].fix


@pytest.mark.slow
def test_an_old_numpy_and_a_new_setuptools(tmp_path):
    """As their metadata say it, and as they then behave: torch and clip-anytorch on them."""
    files = {
        "numpy-1.21.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: numpy\nVersion: 1.21.0\n",
        "setuptools-82.0.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: setuptools\nVersion: 82.0.0\n",
        "pkg_resources.py": "raise ModuleNotFoundError(\"No module named 'pkg_resources'\", name='pkg_resources')",
    }
    status, checks, _ = shadowed(tmp_path, files)
    assert status == 1
    assert checks["numpy"][0].found == "expected numpy>=1.26, found 1.21.0"
    assert "numpy>=1.26" in checks["numpy"][0].fix
    clip = checks["clip"][0]
    assert (clip.state, clip.found) == (PROBLEM, "needs pkg_resources, which setuptools 82.0.0 does not have")
    assert clip.fix.endswith(" 'setuptools<82'")
    assert checks["CoOpGRAM"][0].state == NOTE  # not tried


@pytest.mark.slow
def test_without_packaging_no_version_is_compared(tmp_path):
    text = "raise ModuleNotFoundError(\"No module named 'packaging'\", name='packaging')"
    status, checks, _ = shadowed(tmp_path, {"packaging/__init__.py": text})
    assert status == 1
    for name in ("Python", "packages"):
        assert checks[name][0].found == "ModuleNotFoundError: No module named 'packaging'"
        assert checks[name][0].fix.endswith(" install packaging") or " packaging" in checks[name][0].fix


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, state, word",
    [
        ("import this_is_not_there", NOTE, "built-in engine steps in"),
        ("raise SystemExit('no licence')", PROBLEM, "no licence"),
    ],
)
def test_a_broken_dassl(tmp_path, text, state, word):
    files = {"dassl/__init__.py": "", "dassl/engine/__init__.py": text}
    status, checks, _ = shadowed(tmp_path, files, GRAM_DASSL="auto")
    lines = checks["Dassl"]
    assert lines[-1].state == state and word in " ".join(line.found for line in lines)
    assert (status == 0) == (state == NOTE)
    advice = {NOTE: "python -m pip install this_is_not_there", PROBLEM: "export GRAM_DASSL=builtin"}
    assert lines[-1].fix == advice[state]
    assert (checks["CoOpGRAM"][0].state == FINE) == (state == NOTE)  # else not tried


@pytest.mark.parametrize("wish, fix", [("real", "unset GRAM_DASSL"), ("auto", "export GRAM_DASSL=builtin")])
def test_a_dassl_that_was_asked_for_and_does_not_import(monkeypatch, wish, fix):
    from gram_meta import engine

    monkeypatch.setenv("GRAM_DASSL", wish)
    monkeypatch.setattr(engine, "backend", lambda: compile("def broken(:", "dassl.py", "exec"))
    (check,) = run(doctor.check_dassl)
    assert check.state == PROBLEM and check.found.startswith("SyntaxError: ") and check.fix == fix


@pytest.mark.slow
def test_a_package_that_ends_the_process_when_imported(tmp_path):
    status, checks, _ = shadowed(tmp_path, {"yacs/__init__.py": "import sys; sys.exit(3)"})
    assert status == 1 and (checks["Dassl"][0].state, checks["Dassl"][0].found) == (PROBLEM, "SystemExit: 3")


# ----------------------------------------------------------------------------------------------------------- in-process


def fake(monkeypatch, name, **attributes):
    module = types.ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


def test_the_clipboard_manager_is_no_clip(monkeypatch, tmp_path):
    fake(monkeypatch, "clip", __file__="/usr/lib/site-packages/clip/__init__.py", copy=print)
    (check,) = run(doctor.check_clip)
    assert check.state == PROBLEM and "another package of that name" in check.found
    assert " clip && " in check.fix and "--no-deps clip-anytorch 'setuptools<82'" in check.fix  # they share a folder
    monkeypatch.chdir(tmp_path)
    fake(monkeypatch, "clip", __file__=str(tmp_path / "clip.py"))
    (check,) = run(doctor.check_clip)
    assert check.fix == f"remove or rename {tmp_path / 'clip.py'}"


def test_no_clip_at_all(monkeypatch):
    monkeypatch.setitem(sys.modules, "clip", None)
    (check,) = run(doctor.check_clip)
    assert check.state == PROBLEM and "clip-anytorch 'setuptools<82'" in check.fix


def test_requirements_are_compared(monkeypatch):
    assert satisfies("1.26.4", "numpy>=1.26") and satisfies("2.0", "numpy>=1.26") and satisfies("1.26", "numpy>=1.26.0")
    assert not satisfies("1.9", "numpy>=1.26") and not satisfies("82.0.0", "setuptools<82")
    assert satisfies("81.0.0", "setuptools<82") and satisfies("2.15.0+cu132", 'torch>=2.4; extra == "x"')
    assert satisfies("2.15.0.dev1", "torch>=2.15")
    version = importlib.metadata.version
    missing = {"hdbscan": None, "tqdm": None, "scikit-learn": "1.2.0"}

    def installed(name):
        if name in missing and missing[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return missing.get(name) or version(name)

    monkeypatch.setattr(importlib.metadata, "version", installed)
    checks = run(doctor.check_packages)
    corpus = only(checks, "gram-meta[corpus]")
    assert corpus.state == NOTE and corpus.fix.endswith(" install 'gram-meta[corpus]'")
    assert "gram embed, cluster," in corpus.found and corpus.found.endswith(" need hdbscan>=0.8.38 (found none)")
    assert only(checks, "tqdm").state == PROBLEM and only(checks, "tqdm").fix.endswith("tqdm>=4.60'")
    assert only(checks, "scikit-learn").found == "expected scikit-learn>=1.6, found 1.2.0"


def test_not_installed_but_used_from_its_folder(monkeypatch):
    def none(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", none)
    (check,) = run(doctor.check_packages)
    assert check.state == NOTE and check.fix.endswith(f" -e {ROOT}")


def test_a_training_that_fails_is_a_problem(monkeypatch):
    from gram_meta.coop import launch

    def broken(*args, **kwargs):
        raise RuntimeError("the regulator\nis lost")

    monkeypatch.setattr(launch, "train", broken)
    monkeypatch.setattr(doctor, "CHECKS", [("CoOpGRAM", doctor.check_training, ())])
    (check,) = examine(Environment())
    assert check == Check("CoOpGRAM", PROBLEM, "RuntimeError: the regulator is lost", "gram doctor --traceback")
    assert not can_run([check])


def test_a_training_without_regulated_steps_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "train_tiny", lambda folder: (0, 50.0))
    monkeypatch.setattr(doctor, "CHECKS", [("CoOpGRAM", doctor.check_training, ())])
    assert examine(Environment())[0].state == PROBLEM


@pytest.mark.slow
def test_the_step_is_a_regulated_one(tmp_path):
    """The prompt has moved away from theta*, by what R made of its gradient."""
    from gram_meta.engine.checkpoints import read_checkpoint
    from gram_meta.method.checkpoint import load_meta_checkpoint

    steps, accuracy = doctor.train_tiny(tmp_path)
    assert steps == 1 and 0 <= accuracy <= 100
    start = load_meta_checkpoint(tmp_path / "meta.safetensors").prompts["text"]
    state = read_checkpoint(tmp_path / "run" / "prompt_learner" / "model.pth.tar-1")
    assert 0 < (state["state_dict"]["ctx"] - start).abs().max() < 1
    assert state["trainer"] == "CoOpGRAM"


# ---------------------------------------------------------------------------------------------------- weights and cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A home with an empty cache, and a published model of 60 bytes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".cache" / "clip"
    folder.mkdir(parents=True)
    whole = folder / "ViT-B-16.pt"
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("archive/data.pkl", "weights")
    digest = hashlib.sha256(whole.read_bytes()).hexdigest()
    import clip

    urls = {"ViT-B/16": f"https://host/{digest}/ViT-B-16.pt", "RN50": "https://host/1234/RN50.pt"}
    monkeypatch.setattr(clip.clip, "_MODELS", urls)
    return folder


def test_cached_weights_are_looked_at(cache):
    check = only(run(doctor.check_weights), "CLIP ViT-B/16")
    assert check.state == FINE and "not compared" in check.found
    check = only(run(doctor.check_weights, verify=True), "CLIP ViT-B/16")
    assert check.state == FINE and check.found.endswith("SHA-256 as published")
    whole = (cache / "ViT-B-16.pt").read_bytes()
    (cache / "ViT-B-16.pt").write_bytes(whole[:-30])  # a download that was cut
    check = only(run(doctor.check_weights), "CLIP ViT-B/16")
    assert check.state == NOTE and "not whole" in check.found
    assert check.fix.startswith(f"rm {cache}/ViT-B-16.pt && curl -L") and check.fix.endswith("/ViT-B-16.pt")
    assert run(doctor.check_backbone, backbone="ViT-B/16")[0].state == PROBLEM
    with zipfile.ZipFile(cache / "ViT-B-16.pt", "w") as archive:
        archive.writestr("archive/data.pkl", "other weights")
    assert only(run(doctor.check_weights), "CLIP ViT-B/16").state == FINE
    assert "differs" in only(run(doctor.check_weights, verify=True), "CLIP ViT-B/16").found


def test_weights_that_are_not_cached_come_with_the_command_that_gets_them(cache):
    (check,) = run(doctor.check_backbone, backbone="RN50")
    assert check.state == NOTE and check.fix == f"curl -L --create-dirs -o {cache}/RN50.pt https://host/1234/RN50.pt"
    (check,) = run(doctor.check_backbone, backbone="ViT-B/17")
    assert check.state == PROBLEM and "ViT-B/17" in check.found
    (check,) = run(doctor.check_backbone, backbone="random-tiny")
    assert check.state == FINE and "32 px, text width 64" in check.found


# -------------------------------------------------------------------------------------- data, meta-checkpoints, folders


def test_datasets_under_a_root(tiny_data, tmp_path):
    checks = run(doctor.check_datasets, root=str(tiny_data))
    food = only(checks, "dataset emoji_food")
    assert (food.state, food.found) == (FINE, "4 classes, train 8, val 4, test 8")
    assert only(checks, "datasets").state == NOTE and "imagenet" in only(checks, "datasets").found
    (tmp_path / "dtd").mkdir()
    checks = run(doctor.check_datasets, root=str(tmp_path))
    assert only(checks, "dataset dtd").state == NOTE
    assert only(checks, "dataset dtd").fix == f"gram check-data {tmp_path} --datasets dtd"
    assert only(checks, "datasets").state == PROBLEM
    (check,) = run(doctor.check_datasets, root=str(tmp_path / "gone"))
    assert check.state == PROBLEM and "no such folder" in check.found


@pytest.fixture
def metas(tmp_path):
    from gram_meta.backbone.clip import load_backbone
    from gram_meta.method.checkpoint import MetaCheckpoint, save_meta_checkpoint
    from gram_meta.method.prompts import initial_prompts

    backbone = load_backbone("random-tiny")
    folder = tmp_path / "output" / "meta"
    meta = MetaCheckpoint(initial_prompts(backbone, 4, 0), None, "random-tiny", backbone.fingerprint)
    save_meta_checkpoint(folder / "good" / "best.safetensors", meta)
    (folder / "bad").mkdir()
    (folder / "bad" / "best.safetensors").write_bytes(b"cut")
    return folder


def test_meta_checkpoints_and_their_backbones(metas, monkeypatch, tmp_path):
    checks = run(doctor.check_meta, meta=[str(metas)])
    assert [check.state for check in checks] == [NOTE, FINE]  # one that fits is enough
    assert "for random-tiny" in checks[1].found and "4 text tokens, without R" in checks[1].found
    checks = run(doctor.check_meta, meta=[str(metas / "good")], backbone="ViT-B/16")
    assert [check.state for check in checks] == [NOTE, PROBLEM]
    assert checks[0].fix == "train with --backbone random-tiny"
    environment = Environment(
        meta=[str(metas / "good")], backbone="a file", fingerprint="0" * 64
    )  # loaded, other weights
    assert [check.state for check in doctor.check_meta(environment)] == [NOTE, PROBLEM]
    for path in (metas / "bad", tmp_path / "gone"):
        assert run(doctor.check_meta, meta=[str(path)])[-1].state == PROBLEM
    monkeypatch.chdir(tmp_path)
    assert [check.state for check in run(doctor.check_meta)] == [NOTE, FINE]  # output/meta, unasked
    monkeypatch.chdir(metas)
    (check,) = run(doctor.check_meta)
    assert check.state == NOTE and "none below output/meta" in check.found


def test_where_results_go(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=5_000_000_000))
    (check,) = run(doctor.check_output, output=str(tmp_path / "new" / "output"))
    assert check.state == FINE and "5.0 GB free" in check.found and not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    (check,) = run(doctor.check_output, output=str(tmp_path / "file" / "output"))
    assert check.state == PROBLEM and "cannot be written" in check.found


def test_in_a_checkout_it_says_what_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(doctor.check_checkout) == []
    for name in ("clip", "trainers"):
        (tmp_path / name).mkdir()
    (tmp_path / "train.py").write_text("from dassl.engine import build_trainer\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    (check,) = run(doctor.check_checkout)
    assert check.found.endswith("its clip/, trainers/ are used in place of ours")
    assert sys.path[0] == str(tmp_path)  # later checks see what its train.py sees


def test_a_python_that_is_not_tried(monkeypatch):
    assert run(doctor.check_python)[0].state == FINE
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: {"Requires-Python": ">=3.0,<3.2"})
    assert run(doctor.check_python)[0].state == NOTE


def test_the_real_dassl_is_listed_with_its_fixes(monkeypatch):
    from gram_meta import engine

    fixes = [
        types.SimpleNamespace(id="B1", summary="schedulers build", applied=True),
        types.SimpleNamespace(id="B8", summary="no tensorboard", applied=False),
    ]
    monkeypatch.setattr(engine, "backend", lambda: "real")
    monkeypatch.setattr(engine, "fixes", lambda: fixes)
    fake(monkeypatch, "dassl", __file__="/somewhere/dassl/__init__.py")
    checks = run(doctor.check_dassl)
    assert checks[0].found == "the real Dassl, /somewhere/dassl"
    assert [check.name for check in checks[1:]] == ["Dassl B1"]
    assert "repaired in memory: schedulers build" in checks[1].found
