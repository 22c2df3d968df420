"""What README.md, docs/ and examples/ tell people to import or to run; a warning that something has moved is fine."""

import importlib
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
IMPORT = re.compile(r"^ *from (gram_meta[\w.]*) import (\([^)]*\)|[\w ,]+)", re.MULTILINE)

# Documented up to version 0.1: module and name, or a module alone.
DOCUMENTED = (
    "gram_meta.plugin",
    "gram_meta.cli main",
    "gram_meta.backbone load_backbone",
    "gram_meta.checkpoint load_meta_checkpoint",
    "gram_meta.checkpoint save_meta_checkpoint",
    "gram_meta.checkpoint MetaCheckpoint",
    "gram_meta.prompts PromptedCLIP",
    "gram_meta.predict Predictor",
    "gram_meta.regulation Regulation",
    "gram_meta.regulation start_from",
    "gram_meta.regulation WithGRAM",
    "gram_meta.engine room",
    "gram_meta.engine repairs",
    "gram_meta.engine TRAINER_REGISTRY",
    "gram_meta.engine DATASET_REGISTRY",
    "gram_meta.engine.options extend_cfg",
    "gram_meta.engine.checkpoints read_checkpoint",
    "gram_meta.config load_meta_config",
    "gram_meta.report all_tables",
    "gram_meta.report gather",
    "gram_meta.report paper_tables",
    "gram_meta.report render",
    "gram_meta.report runs_of",
    "gram_meta.demo.world write_world",
    "gram_meta.trainers.coop CoOp",
    "gram_meta.trainers.coopgram CoOpGRAM",
    "gram_meta.trainers.cocoop CoCoOp",
    "gram_meta.trainers.cocoopgram CoCoOpGRAM",
    "gram_meta.trainers.vpt VPT",
    "gram_meta.trainers.vptgram VPTGRAM",
    "gram_meta.trainers.jointprompt JointPrompt",
    "gram_meta.trainers.unigram UniGRAM",
    "gram_meta.trainers.zsclip ZeroshotCLIP",
    "gram_meta.datasets",
)


@pytest.mark.parametrize("what", DOCUMENTED)
def test_import(what):
    module, _, name = what.partition(" ")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = importlib.import_module(module)
    assert not name or callable(getattr(found, name)) or name.endswith("REGISTRY")


def documented_now():
    """(module, names) of each `from gram_meta... import ...` in README.md, docs/ and examples/ as they are."""
    found = set()
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.py")]:
        for module, names in IMPORT.findall(path.read_text(encoding="utf-8")):
            found |= {(module, name.split(" as ")[0].strip()) for name in names.strip("()").split(",") if name.strip()}
    return sorted(found)


def test_imports_in_documents_work():
    assert documented_now()
    for module, name in documented_now():
        if not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")


def test_the_plugin_registers_all_trainers():
    from gram_meta import engine

    importlib.import_module("gram_meta.plugin")
    names = {"ZeroshotCLIP", "CoOp", "CoCoOp", "VPT", "JointPrompt", "CoOpGRAM", "CoCoOpGRAM", "VPTGRAM", "UniGRAM"}
    assert names <= set(engine.TRAINER_REGISTRY.registered_names())


def run(*argv, cwd) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *argv], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_python_m_gram_meta(tmp_path):
    done = run("-m", "gram_meta", "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage: gram ")


def test_python_m_plugin_runs_a_script(tmp_path):
    """`python -m gram_meta.plugin SCRIPT ...`: a script of a checkout, which finds Dassl."""
    (tmp_path / "script.py").write_text(
        "import sys\nfrom dassl.engine import TRAINER_REGISTRY\nprint(__name__, sys.argv[1:], "
        "len(TRAINER_REGISTRY.registered_names()) > 8)\n"
    )
    done = run("-m", "gram_meta.plugin", "script.py", "output/a", "--ci95", cwd=tmp_path)
    assert done.stdout == "__main__ ['output/a', '--ci95'] True\n", done.stderr


def test_python_m_train_clip_names_the_script(tmp_path):
    """Documents of version 0.1 say how the packaged CLIP was trained by this module; the recipe is a script now."""
    done = run("-m", "gram_meta.demo.train_clip", "--help", cwd=tmp_path)
    assert done.returncode == 1 and "run python scripts/train_packaged_clip.py" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_import_that_is_one_line_in_a_train_py(tmp_path):
    """`import gram_meta.plugin` first: then the names of dassl are there, and `clip` too."""
    imports = "import gram_meta.plugin; import dassl.engine, dassl.config, dassl.data, clip"
    code = f"{imports}; print(dassl.engine.build_trainer.__name__)"
    done = run("-c", code, cwd=tmp_path)
    assert done.stdout == "build_trainer\n", done.stderr
