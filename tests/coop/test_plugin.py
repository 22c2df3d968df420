"""The plugin in a CoOp-style checkout: who wins, what a foreign train.py finds, and runs in one that this file
writes."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from yacs.config import CfgNode as CN

import gram_meta.plugin  # noqa: F401, fills the registries
from gram_meta.config import _packaged_configs
from gram_meta.coop import checkout, missing_packages, register
from gram_meta.coop.command_line import CommandLine
from gram_meta.coop.defaults import CHECKPOINT_VARIABLE, Defaults, config_path, extend_defaults
from gram_meta.engine import TRAINER_REGISTRY, get_cfg_default, registries
from gram_meta.engine.builtin.utils import Registry as BuiltinRegistry
from gram_meta.engine.options import complete_cfg
from gram_meta.errors import GramError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

# --------------------------------------------------------------------------------------------------- who wins a name


class StrictRegistry:
    """The interface of Dassl's registry and its rule: one name, one object."""

    def __init__(self, name):
        self._name, self._obj_map = name, {}

    def _do_register(self, name, obj, force=False):
        if name in self._obj_map and not force:
            raise KeyError(name)
        self._obj_map[name] = obj

    def register(self, obj=None, force=False):
        if obj is None:

            def wrapper(decorated):
                self._do_register(decorated.__name__, decorated, force=force)
                return decorated

            return wrapper
        self._do_register(obj.__name__, obj, force=force)

    def get(self, name):
        return self._obj_map[name]

    def registered_names(self):
        return list(self._obj_map)


def same_name(text):
    return type("CoOp", (), {"text": text})


@pytest.fixture(params=[StrictRegistry, BuiltinRegistry])
def registry(request):
    return request.param("TRAINER")


@pytest.mark.parametrize("way", ["decorator", "call", "forced"])
def test_a_checkouts_class_replaces_ours(registry, way):
    ours, theirs = same_name("ours"), same_name("theirs")
    assert registries.enter(registry, ours) is ours
    assert registry.get("CoOp") is ours and registries.own_names(registry) == {"CoOp"}
    if way == "decorator":
        assert registry.register()(theirs) is theirs
    else:
        registry.register(theirs, force=way == "forced")
    assert registry.get("CoOp") is theirs
    assert registries.own_names(registry) == set()


def test_ours_does_not_replace_a_checkouts(registry):
    ours, theirs = same_name("ours"), same_name("theirs")
    registry.register(theirs)
    registries.enter(registry, ours)
    assert registry.get("CoOp") is theirs


def test_of_two_classes_of_checkouts_the_second_is_an_error(registry):
    registries.enter(registry, same_name("ours"))
    registry.register(same_name("theirs"))
    with pytest.raises(KeyError):
        registry.register(same_name("another's"))
    registries.enter(registry, same_name("ours"))
    assert registry.get("CoOp").text == "theirs"


def test_ours_again_is_no_error_and_the_registry_stays_the_same_object(registry):
    held = registry
    registries.enter(registry, same_name("ours"))
    registries.enter(registry, same_name("ours, imported anew"))
    assert held.get("CoOp").text == "ours, imported anew"
    assert held.registered_names() == ["CoOp"]
    assert isinstance(held, type(registry)) and type(held).__name__ == type(registry).__name__


def test_a_new_name_of_a_checkout_is_its_own(registry):
    registries.enter(registry, same_name("ours"))
    registry.register(type("MaPLe", (), {}))
    assert set(registry.registered_names()) == {"CoOp", "MaPLe"}
    assert registries.own_names(registry) == {"CoOp"}


def test_the_trainers_with_gram_are_registered():
    assert {"CoOpGRAM", "CoCoOpGRAM", "VPTGRAM", "UniGRAM"} <= set(TRAINER_REGISTRY.registered_names())


# ----------------------------------------------------------------------------------------------------- configuration


@pytest.fixture
def typed(monkeypatch):
    """Let copies of the default config tree follow these flags."""
    monkeypatch.delenv(CHECKPOINT_VARIABLE, raising=False)

    def follow(*flags):
        return extend_defaults(CommandLine.parse(flags))

    follow()
    yield follow
    follow()


@pytest.fixture
def cfg(typed):
    return train_pys_tree()


def train_pys_tree():
    """Return what a train.py has after its own extend_cfg, which replaces a node that this project has too."""
    tree = get_cfg_default()
    tree.TRAINER.VPT = CN()
    tree.TRAINER.VPT.N_CTX_VISION = 2
    return tree


def test_get_cfg_default_has_our_options_wherever_it_was_imported_from():
    from dassl.config import get_cfg_default as imported_by_a_checkout

    for tree in (get_cfg_default(), imported_by_a_checkout()):
        assert tree.TRAINER.GRAM.REGULATE is True and tree.DATASET.SUBSAMPLE_CLASSES == "all"
        assert isinstance(tree, CN)


def test_a_replaced_node_is_completed_not_replaced(cfg):
    cfg.merge_from_list(["TRAINER.VPT.CTX_INIT", "a drawing of a"])
    assert cfg.TRAINER.VPT.N_CTX_VISION == 2  # the checkout's
    assert cfg.TRAINER.VPT.CTX_INIT == "a drawing of a"  # not in its node
    assert cfg.TRAINER.VPT.PROMPT_DEPTH_VISION == 1


def test_old_keys_of_memory_are_accepted_with_a_note(cfg, tmp_path, capsys):
    file = tmp_path / "old.yaml"
    file.write_text("TRAINER:\n  MEMORY:\n    TEXT_GB: 2.5\n    IMAGE_GB: 3.0\n")
    cfg.merge_from_file(file)
    cfg.merge_from_list(["TRAINER.MEMORY.CHECKPOINT", "always"])
    cfg.TRAINER.MEMORY.CLASS_CHUNK = 7  # as a train.py may set it
    complete_cfg(cfg)
    memory = {"CHECKPOINTING": "always", "CLASSES": 7, "TEXT_BUDGET": 2.5, "IMAGE_BUDGET": 3.0, "KEPT_IMAGES": 2.0}
    assert dict(cfg.TRAINER.MEMORY) == memory | {"CUDA_GRAPHS": True}
    assert capsys.readouterr().out.splitlines() == [
        "Note: TRAINER.MEMORY.TEXT_GB is now called TRAINER.MEMORY.TEXT_BUDGET",
        "Note: TRAINER.MEMORY.IMAGE_GB is now called TRAINER.MEMORY.IMAGE_BUDGET",
        "Note: TRAINER.MEMORY.CHECKPOINT is now called TRAINER.MEMORY.CHECKPOINTING",
        "Note: TRAINER.MEMORY.CLASS_CHUNK is now called TRAINER.MEMORY.CLASSES",
    ]


def test_a_frozen_tree_is_completed_and_stays_frozen():
    tree = CN({"TRAINER": CN({"VPT": CN({"N_CTX_VISION": 2})}), "DATASET": CN(), "TEST": CN(), "TRAIN": CN()})
    tree.freeze()
    complete_cfg(tree)
    assert tree.TRAINER.VPT.N_CTX_VISION == 2 and tree.TRAINER.VPT.CTX_INIT == "a photo of a"
    assert tree.TRAINER.GRAM.INIT is True
    assert tree.is_frozen() and tree.TRAINER.GRAM.is_frozen()


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("TRAINER.GRAM.CHECKPIONT", "TRAINER.GRAM.CHECKPOINT"),
        ("TRAINER.COOPP.N_CTX", "TRAINER.COOP.N_CTX"),
        ("DATASET.NUM_SHOT", "DATASET.NUM_SHOTS"),
    ],
)
def test_an_unknown_option_names_the_nearest(cfg, key, nearest):
    with pytest.raises(GramError, match=f"options: unknown key '{key}'; did you mean '{nearest}'"):
        cfg.merge_from_list([key, "1"])


def test_an_unknown_key_in_a_file_names_file_and_nearest(cfg, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("OPTIM:\n  MAX_EPOCHS: 3\n")
    with pytest.raises(GramError, match=r"my\.yaml: unknown key 'OPTIM\.MAX_EPOCHS'; did you mean 'OPTIM\.MAX_EPOCH'"):
        cfg.merge_from_file(str(path))


def test_a_value_of_another_type_is_one_sentence(cfg):
    with pytest.raises(GramError, match=r"^options: OPTIM\.MAX_EPOCH: expected int, found many$"):
        cfg.merge_from_list(["OPTIM.MAX_EPOCH", "many"])


def test_other_errors_of_yacs_stay(cfg):
    with pytest.raises(AssertionError, match="odd length"):
        cfg.merge_from_list(["OPTIM.MAX_EPOCH"])


def test_files_of_the_package_where_there_is_none(typed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trainer = "configs/trainers/CoOpGRAM/vit_b16_c4_ep10_batch32_ctxv1.yaml"
    typed("--trainer", "CoOpGRAM", "--dataset-config-file", "configs/datasets/dtd.yaml", "--config-file", trainer)
    cfg = train_pys_tree()
    cfg.merge_from_file("configs/datasets/dtd.yaml")
    cfg.merge_from_file(trainer)
    assert cfg.DATASET.NAME == "DescribableTextures" and cfg.TRAINER.GRAM.META == "coop_vit_b16"
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and all("taken from the package" in line for line in printed)
    assert printed[1].endswith("vit_b16_c4_ep10_batch32_ctxv1.yaml")


@pytest.mark.parametrize("flags", [["--trainer", "CoOpGRAM"], ["--trainer=CoOpGRAM"]])
def test_bare_names_of_the_package(typed, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    typed(*flags, "--dataset-config-file", "dtd", "--config-file", "vit_b16_c4_ep10_batch32_ctxv1")
    cfg = train_pys_tree()
    cfg.merge_from_file("dtd")
    cfg.merge_from_file("vit_b16_c4_ep10_batch32_ctxv1")
    assert cfg.DATASET.NAME == "DescribableTextures" and cfg.TRAINER.GRAM.META == "coop_vit_b16"


def test_a_file_of_the_checkout_wins(cfg, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("configs/datasets").mkdir(parents=True)
    Path("configs/datasets/dtd.yaml").write_text("DATASET:\n  NAME: Mine\n")
    cfg.merge_from_file("configs/datasets/dtd.yaml")
    assert cfg.DATASET.NAME == "Mine" and capsys.readouterr().out == ""


@pytest.mark.parametrize("suffix", ["yaml", "yml"])
@pytest.mark.parametrize("started_in", ["the checkout", "another folder"])
def test_a_bare_name_is_a_file_of_the_checkout_first(typed, tmp_path, monkeypatch, capsys, suffix, started_in):
    checkout, name = tmp_path / "CoOp", "vit_b16_c4_ep10_batch32_ctxv1"
    for path, text in ((f"trainers/CoOpGRAM/{name}", "OPTIM: {LR: 7.0}"), ("datasets/dtd", "DATASET: {NAME: Mine}")):
        (checkout / "configs" / path).parent.mkdir(parents=True)
        (checkout / "configs" / f"{path}.{suffix}").write_text(text)
    (checkout / "dtd").mkdir()  # a folder is no config file
    monkeypatch.chdir(checkout if started_in == "the checkout" else tmp_path)
    monkeypatch.setattr(sys, "argv", [str(checkout / "train.py")])
    typed("--trainer", "CoOpGRAM", "--dataset-config-file", "dtd", "--config-file", name)
    cfg = train_pys_tree()
    cfg.merge_from_file("dtd")
    cfg.merge_from_file(name)
    assert cfg.DATASET.NAME == "Mine" and cfg.OPTIM.LR == 7
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and all("taken from this checkout: " in line for line in printed)
    assert printed[0].endswith(f"configs/datasets/dtd.{suffix}")


@pytest.mark.parametrize("name", ["vit_b16_c4_ep10_batch32_ctxv1", "configs/trainers/CoOpGRM/any.yaml"])
def test_a_trainers_typo_is_not_blamed_on_the_config(typed, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    typed("--trainer", "CoOpGRM", "--config-file", name)
    with pytest.raises(GramError) as error:
        train_pys_tree().merge_from_file(name)
    assert str(error.value) == "--trainer is 'CoOpGRM', which is no known trainer; did you mean 'CoOpGRAM'?"


@pytest.mark.parametrize("late", [["--seed", "1"], ["--eval-only"], ["--output-dir=out"]])
def test_flags_behind_pairs_are_one_sentence(cfg, late):
    with pytest.raises(GramError) as error:
        cfg.merge_from_list(["DATASET.NUM_SHOTS", "4", *late])
    assert str(error.value) == f"{late[0]} stands behind KEY VALUE pairs; expected flags before them"


def test_paths_of_the_home_folder(typed, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv(CHECKPOINT_VARIABLE, "~/meta/best.safetensors")
    typed("--trainer", "CoOpGRAM")
    cfg = get_cfg_default()
    (tmp_path / "my.yaml").write_text("DATASET: {ROOT: ~/data}\nMODEL:\n  BACKBONE: {NAME: ~/clip.pt}\n")
    cfg.merge_from_file(str(tmp_path / "my.yaml"))
    cfg.merge_from_list(["OUTPUT_DIR", "~/out", "INPUT.TRANSFORMS", "('normalize', '~')"])
    assert (cfg.DATASET.ROOT, cfg.MODEL.BACKBONE.NAME, cfg.OUTPUT_DIR) == (
        *("/home/ada/data", "/home/ada/clip.pt", "/home/ada/out"),
    )
    assert cfg.TRAINER.GRAM.CHECKPOINT == "/home/ada/meta/best.safetensors"


def test_a_file_that_is_nowhere_names_the_nearest(typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("configs/datasets/dtdd.yaml", "dtdd"):
        command_line = typed("--trainer", "CoOpGRAM", "--dataset-config-file", name)
        with pytest.raises(GramError, match=f"{name}.*did you mean 'datasets/dtd'"):
            config_path(name, command_line)
    with pytest.raises(GramError, match="did you mean 'trainers/CoOpGRAM/vit_b16_c4_ep10_batch32_ctxv1'"):
        config_path("vit_b16_c4_ep10_batch23_ctxv1", command_line)


def test_every_file_of_the_package_merges_in_a_foreign_train_py(typed):
    files = [*_packaged_configs().glob("datasets/*.yaml"), *_packaged_configs().glob("trainers/*/*.yaml")]
    assert len(files) > 60
    base = get_cfg_default()
    for path in files:  # yacs itself is strict about types
        Defaults.merge_from_file(base.clone(), str(path))


@pytest.mark.parametrize(
    ("flags", "seed"),
    [
        (["--seed", "0"], 0),
        (["--seed=0"], 0),
        (["--seed", "1"], -1),  # the train.py itself sets it
        ([], -1),
        (["--trainer", "CoOp", "DATASET.NUM_SHOTS", "0"], -1),
    ],
)
def test_seed_0_counts(typed, flags, seed):
    typed(*flags)
    assert get_cfg_default().SEED == seed


def test_a_seed_that_was_set_is_kept(typed):
    typed("--seed", "0")
    tree = get_cfg_default()
    tree.SEED = 3
    assert tree.clone().SEED == 3


@pytest.mark.parametrize(("trainer", "expected"), [("CoOpGRAM", "/meta/best.safetensors"), ("CoOp", "")])
def test_the_environment_names_the_checkpoint_of_a_trainer_with_gram(typed, monkeypatch, trainer, expected):
    typed("--trainer", trainer)
    monkeypatch.setenv(CHECKPOINT_VARIABLE, "/meta/best.safetensors")
    assert get_cfg_default().TRAINER.GRAM.CHECKPOINT == expected


def test_the_command_line_is_read_as_argparse_would():
    words = ["--root", "data", "--seed=0", "--dataset-config-file", "dtd", "--trainer"]
    assert CommandLine.parse(words) == CommandLine(seed="0", dataset_config_file="dtd", trainer="")


# --------------------------------------------------------------------------------------------- which train.py it is

COOP_LIKE = "import torch\nfrom dassl.engine import build_trainer\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (COOP_LIKE, True),
        ("# from dassl.engine import build_trainer\n", False),
        ("import torch\nmodel.train()\n", False),
        (None, False),
    ],
)
def test_a_checkout_is_known_by_its_train_py(tmp_path, monkeypatch, text, found):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("train.py").write_text(text)
    assert checkout.train_py_for(["--seed", "1"]) == (tmp_path / "train.py" if found else None)
    assert checkout.train_py_for(["--help"]) is None


def test_our_own_train_py_is_none(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert checkout.train_py_for([]) is None


def test_main_with_arguments_never_runs_a_checkout(tmp_path, monkeypatch, capsys):
    """A program in a checkout's folder, such as `gram bench`, means this project's own."""
    from gram_meta import cli

    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(f'raise SystemExit("ran")\n{COOP_LIKE}')
    assert cli.main(["train", "--trainer", "NoSuch"]) == 2
    assert "NoSuch" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ a small checkout

TRAIN_PY = """
import argparse
{first}
from dassl.config import get_cfg_default
from dassl.engine import build_trainer
from dassl.utils import set_random_seed, setup_logger
{middle}
import datasets.food
import trainers.own
{last}


def extend_cfg(cfg):
    from yacs.config import CfgNode as CN

    cfg.TRAINER.COOP = CN()  # replaces what was there
    cfg.TRAINER.COOP.N_CTX = 16
    cfg.TRAINER.COOP.CTX_INIT = ""
    cfg.TRAINER.COOP.PREC = "fp32"
    cfg.TRAINER.OWN = CN()
    cfg.TRAINER.OWN.WORD = "hello"
    cfg.DATASET.SUBSAMPLE_CLASSES = "all"


def main(args):
    cfg = get_cfg_default()
    extend_cfg(cfg)
    for path in (args.dataset_config_file, args.config_file):
        if path:
            cfg.merge_from_file(path)
    cfg.DATASET.ROOT, cfg.OUTPUT_DIR, cfg.TRAINER.NAME = args.root, args.output_dir, args.trainer
    if args.seed:
        cfg.SEED = args.seed
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    if cfg.SEED >= 0:
        print("Fixed seed", cfg.SEED)
        set_random_seed(cfg.SEED)
    setup_logger(cfg.OUTPUT_DIR)
    trainer = build_trainer(cfg)
    if args.eval_only:
        trainer.load_model(args.model_dir, epoch=args.load_epoch)
        trainer.test()
    else:
        trainer.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("root", "output-dir", "config-file", "dataset-config-file", "trainer", "model-dir", "checkouts-own"):
        parser.add_argument(f"--{{name}}", default="")
    parser.add_argument("--seed", type=int, default=-1)
    parser.add_argument("--load-epoch", type=int)
    parser.add_argument("--eval-only", action="store_true")
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    main(parser.parse_args())
"""

TRAINER = """
from dassl.engine import TRAINER_REGISTRY, TrainerX
from clip import clip


@TRAINER_REGISTRY.register()
class CoOp(TrainerX):
    def build_model(self):
        print("The checkout's own CoOp says", self.cfg.TRAINER.OWN.WORD, "with", clip.__file__)
        self.dm.dataset.classnames

    def train(self):
        print("Finish training")
"""

DATASET = """
import json
import os

from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum


@DATASET_REGISTRY.register()
class EmojiFood(DatasetBase):
    def __init__(self, cfg):
        print("The checkout's own EmojiFood")
        folder = os.path.join(cfg.DATASET.ROOT, "emoji_food")
        with open(os.path.join(folder, "split_zhou_EmojiFood.json")) as file:
            split = json.load(file)
        parts = {
            part: [Datum(os.path.join(folder, "images", path), label, 0, name) for path, label, name in items]
            for part, items in split.items()
        }
        super().__init__(train_x=parts["train"], val=parts["val"], test=parts["test"])
"""

# A CLIP of the MaPLe family builds a model only with the details of its prompts
DESIGNED = """

_plain_build_model = build_model


def build_model(state_dict, design_details):
    print("The checkout's own clip:", design_details["trainer"], design_details["vision_depth"])
    return _plain_build_model(state_dict)
"""

FOREIGN = ("datasets", "trainers", "clip", "transformers", "sentence_transformers", "umap", "hdbscan")
PLUGIN = f"import sys, gram_meta.plugin; brought = [name for name in {FOREIGN} if name in sys.modules]"
IMPORT_ENGINE = "import gram_meta.engine; gram_meta.engine.backend()"  # makes `dassl` importable without the real one


def write_checkout(folder, own_clip=False, **where):
    lines = {"first": "", "middle": "", "last": "", **where}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.py").write_text(TRAIN_PY.format(**lines))
    for package, module, text in (("trainers", "own", TRAINER), ("datasets", "food", DATASET)):
        (folder / package).mkdir(exist_ok=True)
        (folder / package / "__init__.py").touch()
        (folder / package / f"{module}.py").write_text(text)
    if own_clip:
        import clip

        shutil.copytree(Path(clip.__file__).parent, folder / "clip")
        with open(folder / "clip" / "model.py", "a") as file:
            file.write(DESIGNED)
    return folder


def in_checkout(folder, *command):
    """Run python in it as somebody would who has this project installed; the finished process."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PYTHONPATH": os.pathsep.join([*_real_dassl(), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", *map(str, command)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def _real_dassl():
    """Where this test session finds the real Dassl: the same for its children."""
    return [entry for entry in sys.path if entry and Path(entry, "dassl", "__init__.py").is_file()]


def flags(data, output, trainer="CoOpGRAM", options=()):
    return (
        *("--root", data, "--seed", "0", "--trainer", trainer, "--output-dir", output),
        *("--dataset-config-file", "configs/datasets/emoji_food.yaml"),
        *("--config-file", "configs/trainers/CoOpGRAM/gram_small_c4_ep10_batch32_ctxv1.yaml"),
        *("DATASET.NUM_SHOTS", "1", "TRAINER.GRAM.REGULATE", "False", "TRAINER.GRAM.INIT", "False", *options),
    )


def test_gram_train_in_a_checkout(tmp_path, tiny_data, tiny_options):
    """`gram train`: its train.py with our trainer, its dataset, its clip of the MaPLe family, its own flags, seed 0."""
    folder = write_checkout(tmp_path / "checkout", own_clip=True)
    run = in_checkout(
        folder, "-m", "gram_meta", "train", "--checkouts-own", "x", *flags(tiny_data, "out", options=tiny_options)
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{folder}/train.py" in run.stderr
    for text in ("Fixed seed 0", "The checkout's own EmojiFood", "Finish training", "* accuracy:"):
        assert text in run.stdout, run.stdout
    assert "The checkout's own CoOp" not in run.stdout
    results = json.loads((folder / "out/results.json").read_text())
    assert results["trainer"] == "CoOpGRAM" and results["seed"] == 0
    assert results["config"]["TRAINER"]["OWN"] == {"WORD": "hello"}
    assert results["config"]["TRAINER"]["COOP"]["CLASS_TOKEN_POSITION"] == "end"  # completed
    assert (folder / "out/log.txt").is_file() and (folder / "out/prompt_learner/model.pth.tar-1").is_file()


def test_bad_input_in_a_checkout_is_one_line(tmp_path, tiny_data):
    folder = write_checkout(tmp_path / "checkout", first=PLUGIN)
    run = in_checkout(folder, "train.py", *flags(tiny_data, "out", options=("TRAINER.GRAM.REGULATED", "True")))
    assert run.returncode == 1
    assert run.stderr == (
        "train.py: options: unknown key 'TRAINER.GRAM.REGULATED'; did you mean 'TRAINER.GRAM.REGULATE'?\n"
    )


def test_a_late_flag_in_a_checkout(tmp_path, tiny_data):
    folder = write_checkout(tmp_path / "checkout")
    run = in_checkout(folder, "-m", "gram_meta", "train", *flags(tiny_data, "out"), "--seed", "1")
    assert run.returncode == 2
    assert run.stderr.endswith("gram train: --seed stands behind KEY VALUE pairs; expected flags before them\n")
    assert not (folder / "out").exists()


PROBE = """
import json, sys
from dassl.data.datasets import DATASET_REGISTRY
from dassl.engine import TRAINER_REGISTRY

names = ("CoOp", "CoCoOp", "CoOpGRAM")
print(json.dumps({
    "trainers": {name: TRAINER_REGISTRY.get(name).__module__ for name in names},
    "datasets": {name: DATASET_REGISTRY.get(name).__module__ for name in ("EmojiFood", "EmojiTravel")},
    "imported": {name: sys.modules[name].__file__ for name in ("clip", "datasets", "trainers") if name in sys.modules},
    "brought": brought,
    "gram": "GRAM" in get_cfg_default().TRAINER,
}))
raise SystemExit
"""


NEEDY = "import no_such_package.part\n\n\nclass Needy:\n    pass\n"


@pytest.mark.parametrize("trainer", ["CoOp", "Needy", ""])
def test_a_trainer_that_lacks_a_package(tmp_path, monkeypatch, capsys, trainer):
    """A note where another is asked for, the error where it is itself, or where nothing is."""
    folder = tmp_path / "trainers"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "needy.py").write_text(NEEDY)
    (folder / "broken.py").write_text("import trainers.no_such_file\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "trainers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    others = [finder for finder in sys.meta_path if not isinstance(finder, missing_packages._Finder)]
    monkeypatch.setattr(sys, "meta_path", others)
    missing_packages.skip_missing_packages(CommandLine(trainer=trainer))
    if trainer != "CoOp":
        with pytest.raises(ModuleNotFoundError, match="no_such_package"):
            importlib.import_module("trainers.needy")
    else:
        importlib.import_module("trainers.needy")
        assert "trainers.needy needs the package no_such_package, which is not here" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError, match="no_such_file"):  # the checkout's own mistake
        importlib.import_module("trainers.broken")
    for name in [name for name in sys.modules if name.partition(".")[0] == "trainers"]:
        del sys.modules[name]


@pytest.mark.parametrize(("place", "own_clip"), [("first", False), ("middle", True), ("last", False)])
def test_the_line_stands_anywhere(tmp_path, place, own_clip):
    """The checkout's classes and folders win, with Hugging Face's `datasets` installed too."""
    lines = {place: PLUGIN} if place == "first" else {"first": IMPORT_ENGINE, place: PLUGIN}
    if place == "first":
        lines["last"] = "import trainers.needy"
    lines["last"] = lines.get("last", "") + PROBE
    folder = write_checkout(tmp_path / "checkout", own_clip=own_clip, **lines)
    (folder / "trainers" / "needy.py").write_text(NEEDY)
    run = in_checkout(folder, "train.py", "--trainer", "CoOpGRAM")
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["gram"]
    if place == "first":  # the plugin imports nobody's packages
        assert found["brought"] == []
        assert "trainers.needy needs the package no_such_package" in run.stderr
    assert found["trainers"] == {
        "CoOp": "trainers.own",
        "CoCoOp": "gram_meta.trainers.cocoop",
        "CoOpGRAM": "gram_meta.trainers.coopgram",
    }
    assert found["datasets"] == {"EmojiFood": "datasets.food", "EmojiTravel": "gram_meta.datasets.emoji"}
    for name in ("datasets", "trainers"):
        assert found["imported"][name] == str(folder / name / "__init__.py")
    assert (found["imported"]["clip"] == str(folder / "clip/__init__.py")) is own_clip


def test_the_checkouts_own_trainer_runs_with_the_plugin(tmp_path, tiny_data):
    folder = write_checkout(tmp_path / "checkout", first=PLUGIN)
    run = in_checkout(folder, "train.py", *flags(tiny_data, "out", "CoOp", ("TRAINER.OWN.WORD", "goodbye")))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "The checkout's own CoOp says goodbye" in run.stdout
    assert "The checkout's own EmojiFood" in run.stdout


# How CoOp's trainers load CLIP
LOAD_CLIP = """
import json

import torch
from clip import clip

from dassl.config import get_cfg_default

cfg = get_cfg_default()
path = clip._download(clip._MODELS["gram-small"])
try:
    state = torch.jit.load(path, map_location="cpu").eval().state_dict()
except RuntimeError:
    state = torch.load(path, map_location="cpu")
model = clip.build_model(state, {"trainer": "CoOp", "vision_depth": 0}).float()
from gram_meta.backbone.packaged import load_packaged_state_dict
near = [torch.allclose(model.state_dict()[key], value, atol=1e-3) for key, value in load_packaged_state_dict().items()
        if key in model.state_dict()]
print(model.visual.input_resolution, len(near) > 30 and all(near), path)
"""


def test_a_checkouts_trainer_loads_the_packaged_clip(tmp_path):
    """With the checkout's own `clip`; the temporary file does not outlive the process."""
    folder = write_checkout(tmp_path / "checkout", own_clip=True)
    (folder / "load.py").write_text(LOAD_CLIP)
    run = in_checkout(folder, "-m", "gram_meta.plugin", "load.py")
    assert run.returncode == 0, run.stderr
    *_, size, same, path = run.stdout.split()
    assert (size, same) == ("64", "True") and not Path(path).exists()


def test_a_namesake_that_was_imported_before_is_forgotten(tmp_path, monkeypatch):
    folder = write_checkout(tmp_path / "checkout")
    hidden = [name for name in sys.modules if name.partition(".")[0] == "datasets"]
    for name in hidden:
        monkeypatch.delitem(sys.modules, name)
    elsewhere = type(sys)("datasets")
    elsewhere.__path__ = [str(tmp_path / "elsewhere")]
    monkeypatch.setitem(sys.modules, "datasets", elsewhere)
    monkeypatch.setitem(sys.modules, "datasets.arrow", type(sys)("datasets.arrow"))
    checkout._forget_namesakes(str(folder))
    assert "datasets" not in sys.modules and "datasets.arrow" not in sys.modules
    elsewhere.__path__ = [str(folder / "datasets")]
    monkeypatch.setitem(sys.modules, "datasets", elsewhere)
    checkout._forget_namesakes(str(folder))
    assert sys.modules["datasets"] is elsewhere


def test_only_bad_input_loses_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py"])
    register.show_bad_input_in_one_line()
    sys.excepthook(GramError, GramError("too little"), None)
    assert capsys.readouterr().err == "train.py: too little\n"
    sys.excepthook(ValueError, ValueError("a bug"), None)
    assert "ValueError: a bug" in capsys.readouterr().err

    def their_own_hook(kind, error, trace):
        pass

    monkeypatch.setattr(sys, "excepthook", their_own_hook)
    register.show_bad_input_in_one_line()
    assert sys.excepthook is their_own_hook
