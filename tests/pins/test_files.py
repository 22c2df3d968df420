"""Names of files, and keys with types inside them: what other programs, and later versions of this one, read."""

import io
import json
import pickle
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.slow


def test_store(made, golden, keys):
    found = {"files": made.files("store"), "manifest.json": keys(made.json("store/manifest.json"))}
    golden.json("store.json", found)


def test_store_tables(made, golden):
    import numpy as np
    import pyarrow.parquet as pq

    arrays = {
        name: np.load(made.root / name, allow_pickle=False)
        for name in (
            "store/image_features.npy",
            "store/sentence_features.npy",
            "store/similarity.npy",
            "hierarchy/fates.npy",
        )
    }
    found = {name: f"{array.dtype} {array.shape}" for name, array in arrays.items()}
    for name in ("store/captions.parquet", "store/images.parquet", "hierarchy/hierarchy.parquet"):
        found[name] = {field.name: str(field.type) for field in pq.read_schema(made.root / name)}
    golden.json("tables.json", found)


def test_hierarchy(made, golden, keys):
    topics = made.json("hierarchy/topics.json")
    found = {
        "files": made.files("hierarchy"),
        "topics.json": keys(topics),
        "topics": sorted([topic["word"], topic["size"], topic["images"]] for topic in topics["topics"]),
        "gram inspect --json": keys(json.loads(made.printed["inspect"])),
    }
    golden.json("hierarchy.json", found)


def test_meta_training(made, golden, keys):
    """run.json, log.jsonl and state.pt; of torch's optimiser state only the entries that this project adds."""
    found = {"files": made.files("meta/text"), "run.json": keys(made.json("meta/text/run.json"))}
    for name in ("text", "visual", "joint", "conditional", "raw", "no_meta", "adam", "two_steps"):
        state = made.torch(f"meta/{name}/state.pt")
        groups = state["optimiser"].pop("param_groups")
        found[name] = {
            "log.jsonl": keys(made.json_lines(f"meta/{name}/log.jsonl")),
            "state.pt": keys(state),
            "state.pt optimiser.param_groups[]": [sorted({"params", "lr", "full_lr"} & set(group)) for group in groups],
        }
    golden.json("meta_training.json", found)


@pytest.mark.parametrize("name", ["text", "visual", "joint", "conditional", "raw"])
def test_meta_checkpoint(name, made, golden, keys):
    found = {}
    for file in ("best", "last"):
        metadata, tensors = made.safetensors(f"meta/{name}/{file}.safetensors")
        whole = () if name == "text" else ("config",)  # all settings, which are the same in all of them
        facts = {key: keys(json.loads(value), leave=whole) for key, value in metadata.items()}
        found[file] = {"metadata": facts, "tensors": keys(dict(sorted(tensors.items())))}
    if found["best"] == found["last"]:
        del found["best"]
    golden.json(f"meta_checkpoint_{name}.json", found)


def test_profile(made, golden, keys):
    found = {"files": made.files("meta/profiled"), "profile.json": keys(made.json("meta/profiled/profile.json"))}
    golden.json("profile.json", found)


def test_run_folders(made, golden, keys):
    """Files of each run, and keys of results.json but those of its config, which is all options."""
    found = {}
    for path in sorted((made.root / "runs").iterdir()):
        results = made.json(f"runs/{path.name}/results.json")
        found[path.name] = {
            "files": made.files(f"runs/{path.name}"),
            "results.json": keys(results, leave=("config",)),
            "run.json": keys(made.json(f"runs/{path.name}/run.json"), leave=("run",)),
        }
    golden.json("run_folders.json", found)


def test_predictions_of_run_folders(made, golden):
    """predictions.npz: its arrays, images below the root of the datasets, and the accuracy of results.json."""
    import numpy as np

    found = {}
    for path in sorted((made.root / "runs").iterdir()):
        results = made.json(f"runs/{path.name}/results.json")
        with np.load(path / "predictions.npz", allow_pickle=False) as file:
            columns = dict(file)
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        assert sum(row["label"] == row["prediction"] for row in rows) == results["metrics"]["correct"]
        assert len(rows) == results["metrics"]["total"] and all(0 < row["confidence"] <= 1 for row in rows)
        assert all((made.root / "data" / row["image"]).is_file() for row in rows)
        names = [results["classnames"][row["label"]] for row in rows]
        assert names == [row["image"].rpartition("/")[2].partition("_")[0] for row in rows]
        found[path.name] = {name: column.dtype.kind for name, column in columns.items()}
    golden.json("predictions.json", found)


def test_options_in_run_files(made, golden):
    """All options with their values in results.json, and with their full keys in run.json, which knows a run again by
    them."""
    root = str(made.root)
    config = json.loads(json.dumps(made.json("runs/CoOpGRAM/results.json")["config"]).replace(root, "ROOT"))
    run = json.loads(json.dumps(made.json("runs/CoOpGRAM/run.json")["run"]).replace(root, "ROOT"))
    assert run["TRAINER.GRAM.CHECKPOINT"].startswith("SHA-256 ")
    run["TRAINER.GRAM.CHECKPOINT"] = "SHA-256 ..."
    golden.json("options_of_a_run.json", {"results.json": config, "run.json": run})


def test_default_options(golden):
    """Defaults of both trees of options: of the trainers and of meta-training."""
    from gram_meta import engine
    from gram_meta.config import as_dict, get_meta_config
    from gram_meta.engine.options import extend_cfg

    if engine.backend() != "builtin":
        pytest.skip("golden files are those of the built-in engine")
    cfg = engine.get_cfg_default()
    extend_cfg(cfg)
    golden.json("options.json", {"gram train": as_dict(cfg), "gram pretrain": as_dict(get_meta_config())})


def test_dassl_checkpoints(made, golden, keys):
    """Dassl's checkpoints as CoOp and its interpret_prompt.py read them; torch's part of them is not looked into."""
    found = {"checkpoint": (made.root / "runs/CoOp/prompt_learner/checkpoint").read_text()}
    for name in ("CoOp", "CoCoOp", "VPT", "JointPrompt", "CoOpGRAM", "CoCoOpGRAM", "VPTGRAM", "UniGRAM"):
        checkpoint = made.torch(f"runs/{name}/prompt_learner/model.pth.tar-2")
        found[name] = keys(checkpoint, leave=("optimizer", "scheduler"))
    found["CoOpGRAM best"] = keys(
        made.torch("runs/CoOpGRAM/prompt_learner/model-best.pth.tar"), ("optimizer", "scheduler")
    )
    found["gram export"] = keys(made.torch("exported.pth.tar"))
    golden.json("dassl_checkpoints.json", found)
    ctx = made.torch("runs/CoOp/prompt_learner/model.pth.tar-2")["state_dict"]["ctx"]  # as interpret_prompt.py reads it
    assert ctx.shape == (4, 64)


def test_few_shot_files(made, golden, keys):
    """split_fewshot/: the JSON, and the pickle for CoOp's own code with what it names."""
    folder = made.root / "data/emoji_food/split_fewshot"
    names = []

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            names.append(f"{module}.{name}")
            return SimpleNamespace

    found = Unpickler(io.BytesIO((folder / "shot_2-seed_1.pkl").read_bytes())).load()
    images = str(made.root / "data/emoji_food/images") + "/"
    records = {
        part: [{**vars(item), "_impath": item._impath.removeprefix(images)} for item in items]
        for part, items in found.items()
    }
    drawn = json.loads((folder / "shot_2-seed_1.json").read_text())
    golden.json(
        "few_shot.json",
        {
            "files": made.files("data/emoji_food/split_fewshot"),
            "pickle names": sorted(set(names)),
            "pickle": records,
            "json": drawn,
        },
    )


def test_what_commands_print_as_json(made, golden, keys):
    commands = ("eval-meta", "interpret", "predict", "report", "check-data")
    golden.json("printed.json", {command: keys(json.loads(made.printed[command])) for command in commands})
