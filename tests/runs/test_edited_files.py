"""Every edit of one value in a JSON file is refused in one sentence, or changes nothing that a reader relies on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.edits import edits
from safetensors import safe_open
from safetensors.torch import save_file

from gram_meta import report
from gram_meta.bench.matrix import BenchSettings, meta_state
from gram_meta.bench.runner import Manifest
from gram_meta.clustering.hierarchy import Hierarchy
from gram_meta.config import load_meta_config
from gram_meta.coop import launch
from gram_meta.corpus.embedding.index import write_index
from gram_meta.corpus.sources.rows import Row, Shard
from gram_meta.corpus.store import PairStore
from gram_meta.demo.run import Memory
from gram_meta.errors import GramError
from gram_meta.files import read_json, write_json
from gram_meta.method.checkpoint import load_meta_checkpoint
from gram_meta.method.meta_run import MetaRun
from gram_meta.report import build_curve
from gram_meta.report.evidence import gather, write_collection
from gram_meta.report.runs import runs_of
from gram_meta.runs.folder import open_folder
from gram_meta.runs.reader import read_saved

pytestmark = pytest.mark.slow

OLD = Path(__file__).resolve().parents[1] / "pins" / "version_0.1"


def check(file, readers):
    """Run the readers of a file on every edit of it; return how many edits each has refused."""
    original, refused = file.read_text(), [0] * len(readers)
    for path, new, edited in edits(json.loads(original)):
        file.write_text(json.dumps(edited))
        for number, read in enumerate(readers):
            try:
                read()
            except GramError as error:
                refused[number] += 1
                assert "\n" not in str(error), error
            except BaseException as error:
                raise AssertionError(f"{path} = {str(new)[:20]}: {error!r}") from error
    file.write_text(original)
    for read in readers:
        read()
    return refused


@pytest.fixture(scope="module")
def run(tiny_data, tiny_options, tmp_path_factory):
    """The folder of a finished run, its flags, and its log of accuracies along the way."""
    out = tmp_path_factory.mktemp("edits") / "run"
    config = ["--dataset-config-file", "emoji_food", "--config-file", "gram_small_c4_ep10_batch32_ctxv1"]
    flags = ["--root", str(tiny_data), "--seed", "1", "--trainer", "CoOp", *config, "--output-dir", str(out)]
    opts = ["DATASET.NUM_SHOTS", "2", "DATALOADER.NUM_WORKERS", "0", "TEST.PER_EPOCH", "True"]
    flags += [*tiny_options, *opts, "DATASET.SUBSAMPLE_CLASSES", "base"]
    launch.train(flags)
    return out, flags


def test_results(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    results = read_json(folder / "results.json")
    results["meta_checkpoint"] = {"path": "m/best.safetensors", "sha256": "ab", "settings": {"OUTER.META": True}}
    write_json(folder / "results.json", results)

    def tables():
        evidence = gather([folder])
        runs = runs_of(evidence)
        assert all(0 <= run.value <= 100 for run in runs)
        for one in report.build_reports(runs):
            assert "nan" not in report.render(one) and json.loads(report.render(one, "json"))
        write_collection(evidence, tmp_path / "all.json")
        runs_of(gather([tmp_path / "all.json"]))
        build_curve(runs) if any(run.curve for run in runs) else None

    tables_refused, saved_refused = check(folder / "results.json", [tables, lambda: read_saved(folder)])
    assert tables_refused > 500 and saved_refused > 300


def test_run(run):
    folder, flags = run
    args = launch.build_parser().parse_args(flags)
    cfg = launch.setup_cfg(args)
    assert open_folder(cfg, args).finished
    assert check(folder / "run.json", [lambda: open_folder(cfg, args)])[0] > 500


def test_meta_run(tmp_path):
    tmp_path = tmp_path / "coop_gram_small"  # the folder's name is that of its config
    config = load_meta_config(["coop_gram_small"])
    facts = {"version": "0", "store": "s", "hierarchy": "h", "topics": 3, "held_out_topics": [0, 1]}
    MetaRun(tmp_path, config, facts).begin()
    readers = [lambda: MetaRun(tmp_path, config, facts).resume(), lambda: meta_state(tmp_path)]
    assert check(tmp_path / "run.json", readers)[0] > 300


def test_store_and_hierarchy(tmp_path):
    folder = shutil.copytree(OLD, tmp_path / "old")
    open_store = lambda: PairStore.open(folder / "store").check_backbone  # noqa: E731
    assert check(folder / "store" / "manifest.json", [open_store])[0] > 100

    def open_hierarchy():
        hierarchy = Hierarchy.open(folder / "hierarchy")
        hierarchy.open_store(folder / "store")

    assert check(folder / "hierarchy" / "topics.json", [open_hierarchy])[0] > 100


def test_plan_and_counts_of_an_embedding(tmp_path):
    def rows(shard):
        return [Row(f"{shard}/{i}.png", f"caption {i}") for i in range(4)] + [Row("", "", "bad UTF-8")]

    shards = [Shard(str(number), lambda number=number: rows(number)) for number in range(2)]
    folder = tmp_path / "parts"

    def read():
        index = write_index(shards, tmp_path, folder, 3)
        assert (index.pairs, index.sizes, index.bounds) == (8, [3, 1, 3, 1], [0, 3, 4, 7, 8])

    def count():
        (folder / "plan.json").unlink(missing_ok=True)
        read()

    read()
    assert check(folder / "plan.json", [read])[0] > 60
    assert check(folder / "index" / "000000.json", [count])[0] > 60


def test_meta_checkpoint(tmp_path):
    source = next(OLD.rglob("*.safetensors"))
    with safe_open(source, framework="pt") as file:
        facts, tensors = json.loads(file.metadata()["gram-meta"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def load(value):
        save_file(tensors, tmp_path / "meta.safetensors", metadata={"gram-meta": json.dumps(value)})
        checkpoint = load_meta_checkpoint(tmp_path / "meta.safetensors")
        assert isinstance(checkpoint.backbone_name, str) and isinstance(checkpoint.config, dict)

    load(facts)
    for path, new, edited in edits(facts):
        try:
            load(edited)
        except GramError as error:
            assert "meta.safetensors: " in str(error)
        except BaseException as error:
            raise AssertionError(f"{path} = {str(new)[:20]}: {error!r}") from error


def test_regulators_and_prompts_with_nan_are_refused(tmp_path):
    source = next(OLD.rglob("*.safetensors"))
    with safe_open(source, framework="pt") as file:
        facts, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for name, value in tensors.items():
        bad = value.clone()
        bad.view(-1)[0] = torch.nan
        save_file({**tensors, name: bad}, tmp_path / "meta.safetensors", metadata=facts)
        with pytest.raises(GramError, match=f"finite numbers in {name}, found 1 of {value.numel()} that are not"):
            load_meta_checkpoint(tmp_path / "meta.safetensors")


def test_bench_and_demo(tmp_path):
    settings = BenchSettings(("base2new",), (), "gram_small", ".", tmp_path, {})
    write_json(
        tmp_path / "bench.json",
        {"format": 1, "benches": [{"command": "gram"}], "durations": {"a|b": [2, 3.5], "": [2, 3.5]}},
    )
    original = (tmp_path / "bench.json").read_text()

    def bench():
        Manifest(tmp_path, settings, [], {})

    check(tmp_path / "bench.json", [bench])
    assert original != (tmp_path / "bench.json").read_text()  # a bench was added
    write_json(tmp_path / "demo.json", {"format": 2, "run": "r", "stages": {"embed": {"key": "k", "finished": True}}})
    assert check(tmp_path / "demo.json", [lambda: Memory(tmp_path / "demo.json").finished("embed", "k")])[0] > 30
