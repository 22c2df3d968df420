"""Hooks: HOOKS.md and the code list the same ones, and each does nothing when GRAM_HOOKS switches it off."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from helpers.processes import python

import gram_meta.plugin  # noqa: F401, installs the hooks
from gram_meta import hooks
from gram_meta.coop import checkout, missing_packages, register
from gram_meta.coop.command_line import CommandLine
from gram_meta.coop.defaults import CHECKPOINT_VARIABLE, Defaults, follow_command_line
from gram_meta.coop.packaged_clip import offer_packaged_clip
from gram_meta.corpus.embedding.sentences import quiet_import
from gram_meta.engine import get_cfg_default, registries
from gram_meta.engine.builtin.utils import Registry
from gram_meta.errors import GramError
from gram_meta.runs.folder import OutputFolder

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| `([\w-]+)` \| .* \| `([\w/.]+)` `(\w+)` \| .* \| `([\w/.]+)` `(\w+)` \|$", re.MULTILINE)


@pytest.fixture
def off(monkeypatch):
    """Return a function that switches hooks off, or all of them on again without names."""
    return lambda *names: monkeypatch.setenv(hooks.VARIABLE, ",".join(f"-{name}" for name in names))


# ------------------------------------------------------------------------------------------------------------ the list


def test_the_page_and_the_code_list_the_same_hooks():
    rows = ROW.findall((ROOT / "gram_meta/coop/HOOKS.md").read_text(encoding="utf-8"))
    assert [row[0] for row in rows] == list(hooks.HOOKS)
    for name, file, place, test_file, test in rows:
        assert f"def {place}(" in (ROOT / file).read_text(encoding="utf-8"), name
        assert f"def {test}(" in (ROOT / test_file).read_text(encoding="utf-8"), name
        assert f"test_{name.replace('-', '_')}" in globals(), f"{name}: no test that it can be switched off"


def test_the_code_asks_for_every_hook_of_the_list():
    asked = set()
    for path in [*ROOT.glob("gram_meta/**/*.py"), *ROOT.glob("trainers/*.py"), *ROOT.glob("datasets/*.py")]:
        asked |= set(re.findall(r'is_on\("([\w-]+)"\)', path.read_text(encoding="utf-8")))
    assert asked == set(hooks.HOOKS)


@pytest.mark.parametrize(
    ("words", "on"),
    [
        ("", {*hooks.HOOKS}),
        ("-excepthook, -seed-zero", {*hooks.HOOKS} - {"excepthook", "seed-zero"}),
        ("none", set()),
        ("none,seed-zero", {"seed-zero"}),
        ("seed-zero,none", set()),
    ],
)
def test_words_are_applied_in_order(monkeypatch, words, on):
    monkeypatch.setenv(hooks.VARIABLE, words)
    hooks.check()
    assert {name for name in hooks.HOOKS if hooks.is_on(name)} == on


def test_an_unknown_hook_names_the_nearest(monkeypatch):
    monkeypatch.setenv(hooks.VARIABLE, "-seed-zeros")
    with pytest.raises(GramError, match="GRAM_HOOKS: .*found '-seed-zeros'; did you mean 'seed-zero'"):
        hooks.check()


# --------------------------------------------------------------------------------------------------- each, switched off


def test_checkout_train_py(off, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("from dassl.engine import build_trainer\n")
    assert checkout.train_py_for([]) is not None
    off("checkout-train-py")
    assert checkout.train_py_for([]) is None


@pytest.mark.parametrize("on", [True, False])
def test_checkout_folders(off, tmp_path, monkeypatch, on):
    script = tmp_path / "script.py"
    script.write_text("import sys\nfrom pathlib import Path\nPath(sys.argv[1]).write_text(sys.path[0])\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    off(*[] if on else ["checkout-folders"])
    checkout.run(script, [str(tmp_path / "first")])
    assert ((tmp_path / "first").read_text() == str(tmp_path)) is on


def test_excepthook(off, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    off("excepthook")
    register.show_bad_input_in_one_line()
    assert sys.excepthook is sys.__excepthook__


@pytest.mark.slow
def test_default_options(tmp_path):
    code = "import gram_meta.plugin; from gram_meta.engine import get_cfg_default as g; print('GRAM' in g().TRAINER)"
    assert python(code, tmp_path, tmp_path, GRAM_HOOKS="-default-options").stdout.strip() == "False"
    assert python(code, tmp_path, tmp_path, GRAM_HOOKS="").stdout.strip() == "True"


def test_config_files(off, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    off("config-files")
    with pytest.raises(FileNotFoundError):
        Defaults.merge_from_file(get_cfg_default(), "configs/datasets/dtd.yaml")


def test_config_errors(off):
    off("config-errors")
    with pytest.raises((KeyError, AssertionError), match="Non-existent"):
        get_cfg_default().merge_from_list(["DATASET.NUM_SHOT", "1"])


@pytest.mark.parametrize("on", [True, False])
def test_seed_zero(off, on):
    tree = get_cfg_default()
    off(*[] if on else ["seed-zero"])
    follow_command_line(tree, CommandLine(seed="0"))
    assert tree.SEED == (0 if on else -1)


@pytest.mark.parametrize("on", [True, False])
def test_checkpoint_variable(off, monkeypatch, on):
    tree = get_cfg_default()
    monkeypatch.setenv(CHECKPOINT_VARIABLE, "best.safetensors")
    off(*[] if on else ["checkpoint-variable"])
    follow_command_line(tree, CommandLine(trainer="CoOpGRAM"))
    assert tree.TRAINER.GRAM.CHECKPOINT == ("best.safetensors" if on else "")


@pytest.mark.parametrize("on", [True, False])
def test_packaged_clip(off, monkeypatch, on):
    clip = SimpleNamespace(_MODELS={"ViT-B/16": "https://a/b.pt"}, _download=lambda address, root=None: address)
    monkeypatch.setitem(sys.modules, "clip.clip", clip)
    download = clip._download
    off(*[] if on else ["packaged-clip"])
    for _ in range(2):
        offer_packaged_clip()
    assert list(clip._MODELS) == ["ViT-B/16", *(["gram-small"] if on else [])]
    assert (clip._download is download) is not on and clip._download("https://a/b.pt") == "https://a/b.pt"


def test_give_way(off):
    registry, ours, theirs = Registry("TRAINER"), type("CoOp", (), {}), type("CoOp", (), {})
    off("give-way")
    assert registries.enter(registry, ours) is ours and registry.get("CoOp") is ours
    assert type(registry) is Registry
    with pytest.raises(KeyError):
        registry.register(theirs)


def test_missing_packages(off, monkeypatch):
    others = [finder for finder in sys.meta_path if not isinstance(finder, missing_packages._Finder)]
    monkeypatch.setattr(sys, "meta_path", list(others))
    off("missing-packages")
    missing_packages.skip_missing_packages(CommandLine(trainer="CoOp"))
    assert sys.meta_path == others


@pytest.mark.slow
def test_answer_as_dassl(tmp_path):
    code = (
        "import sys, gram_meta.plugin\nfrom gram_meta.engine import TRAINER_REGISTRY as r\n"
        "print('dassl' in sys.modules, r.get('CoOpGRAM').__name__)"
    )
    assert (
        python(code, tmp_path, tmp_path, GRAM_DASSL="builtin", GRAM_HOOKS="-answer-as-dassl").stdout.strip()
        == "False CoOpGRAM"
    )


@pytest.mark.slow
def test_dassl_fixes(tmp_path):
    (tmp_path / "dassl").mkdir()
    (tmp_path / "dassl" / "__init__.py").touch()
    (tmp_path / "dassl" / "engine.py").touch()
    code = "from gram_meta import engine; print(engine.backend(), len(engine.fixes()))"
    assert python(code, tmp_path, tmp_path, GRAM_DASSL="real", GRAM_HOOKS="-dassl-fixes").stdout.strip() == "real 0"
    assert python(code, tmp_path, tmp_path, GRAM_DASSL="real", GRAM_HOOKS="").stdout.strip() == "real 11"


@pytest.mark.parametrize("on", [True, False])
def test_log_copy(off, tmp_path, on):
    (tmp_path / "log.txt").write_text("before\n")
    (tmp_path / "log.txt-2026-01-01-00-00-00").touch()
    off(*[] if on else ["log-copy"])
    with OutputFolder.continued_log(SimpleNamespace(path=tmp_path, adds=True)):
        print("after")
    assert (tmp_path / "log.txt").read_text() == ("before\nafter\n" if on else "before\n")


@pytest.mark.parametrize("on", [True, False])
def test_hugging_face_datasets(off, tmp_path, monkeypatch, on):
    (tmp_path / "datasets").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", ModuleType("datasets"))
    monkeypatch.setitem(sys.modules, "sentence_transformers", ModuleType("sentence_transformers"))
    off(*[] if on else ["hugging-face-datasets"])
    with quiet_import():
        assert (str(tmp_path) in sys.path) is not on and ("datasets" in sys.modules) is not on
    assert str(tmp_path) in sys.path and "datasets" in sys.modules
