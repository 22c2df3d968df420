"""scripts/gram: the same runs as `gram bench`, from any folder, with settings from the environment."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gram_meta.bench import matrix
from gram_meta.coop import launch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "gram"
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="no bash on PATH")


@pytest.fixture
def place(tmp_path):
    """A folder to stand in, with data, a meta-checkpoint, and an interpreter that only writes down how it was
    called."""
    here = tmp_path / "some where"
    meta = here / "output" / "meta" / "unigram_vit_b16" / "best.safetensors"
    for folder in (here / "my data", meta.parent):
        folder.mkdir(parents=True)
    meta.write_bytes(b"")
    stub = tmp_path / "interpreter"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@" END >> "$(dirname "$0")/calls"\n')
    stub.chmod(0o755)
    return here


def script(name, place, *words, **environment):
    """Run a script there; its process, and the arguments of every train.py it started."""
    calls = place.parent / "calls"
    calls.unlink(missing_ok=True)
    names = ("TRAINER", "BACKBONE", "CFG", "SHOTS", "SOURCE", "LOADEP", "OUTPUT", "META", "META_DIR", "TARGETS", "SUB")
    base = {key: value for key, value in os.environ.items() if key not in names}
    base |= {"DATA": "my data", "PYTHON": str(place.parent / "interpreter")}
    done = subprocess.run(
        [BASH, str(SCRIPTS / name), *words], cwd=place, env=base | environment, capture_output=True, text=True
    )
    text = calls.read_text() if calls.exists() else ""
    return done, [call.split("\n")[1:-1] for call in text.split("END\n")[:-1]]


def parsed(argv):
    args = launch.build_parser().parse_args(list(argv))
    args.config_file = Path(args.config_file).name
    return args, dict(zip(args.opts[::2], args.opts[1::2], strict=True))


def same(calls, jobs):
    """The calls of scripts are the commands of a bench, flag by flag and option by option."""
    ours, theirs = [parsed(call) for call in calls], [parsed(job.argv[1:]) for job in jobs]
    for (args, opts), (job_args, job_opts) in zip(ours, theirs, strict=True):
        assert {**vars(args), "opts": opts} == {**vars(job_args), "opts": job_opts}


@pytest.mark.parametrize("trainer", ["CoOp", "UniGRAM", "ZeroshotCLIP"])
@pytest.mark.parametrize("shots", ["16", "4"])
def test_scripts_run_what_a_bench_runs(place, monkeypatch, trainer, shots):
    monkeypatch.chdir(place)
    variables = {"TRAINER": trainer, "SHOTS": shots}

    def jobs(*protocols, **datasets):
        planned = matrix.bench_runs(
            matrix.BenchSettings(
                protocols,
                (trainer,),
                "vit_b16",
                "my data",
                Path("output"),
                datasets,
                seeds=(3,),
                shots=int(shots),
                opts=("OPTIM.LR", "0.1"),
            )
        )
        return [job for job in planned if job.argv[0] == "train"]

    end = ("OPTIM.LR", "0.1")
    calls = []
    for name in ("base2new_train.sh", "base2new_test.sh"):
        calls += script(name, place, "caltech101", "3", *end, **variables)[1]
    same(calls, jobs("base2new", base2new=("caltech101",)))
    calls = script("xd_train.sh", place, "3", *end, **variables)[1]
    calls += script("xd_test.sh", place, "dtd", "3", *end, **variables)[1]
    same(calls, jobs("xd", xd=("dtd",)))
    same(script("dg_test.sh", place, "3", *end, **variables)[1], jobs("dg", dg=matrix.DATASETS["dg"])[1:])


def test_settings_come_from_the_environment(place):
    meta = place / "my meta.safetensors"
    meta.write_bytes(b"")
    variables = {
        "TRAINER": "UniGRAM",
        "CFG": "gram_small_c4+4_ep10_batch32_ctxv1",
        "OUTPUT": "my output",
        "META": str(meta),
        "LOADEP": "5",
        "SOURCE": "emoji_travel",
        "TARGETS": "emoji_travel_mosaic emoji_travel_shadow",
    }
    done, calls = script("dg_test.sh", place, "0", **variables)
    assert done.returncode == 0, done.stderr
    for (args, opts), target in zip(map(parsed, calls), ("mosaic", "shadow"), strict=True):
        tail = f"{variables['CFG']}_16shots"
        assert args.output_dir == f"my output/evaluation/UniGRAM/{tail}/emoji_travel_{target}/seed0"
        assert args.model_dir == f"my output/emoji_travel/UniGRAM/{tail}/seed0"
        assert (args.load_epoch, args.seed, opts) == (5, 0, {"TRAINER.GRAM.CHECKPOINT": str(meta)})
    _, calls = script("base2new_test.sh", place, "dtd", "1", **variables, SUB="base")
    args, opts = parsed(calls[0])
    assert "/test_base/" in args.output_dir and opts["DATASET.SUBSAMPLE_CLASSES"] == "base"


@pytest.mark.parametrize(
    ("name", "words", "environment", "says"),
    [
        ("base2new_train.sh", ["dtd"], {}, "expected 2 argument(s), found 1"),
        ("xd_train.sh", [], {}, "expected 1 argument(s), found 0"),
        ("xd_train.sh", ["one"], {"TRAINER": "CoOp"}, "expected a number from 0 on as SEED, found 'one'"),
        ("xd_train.sh", ["1", "OPTIM.LR"], {}, "found OPTIM.LR without a value"),
        ("xd_train.sh", ["1"], {"DATA": ""}, "DATA: expected the folder"),
        ("xd_train.sh", ["1"], {"DATA": "nowhere"}, "found none at nowhere"),
        ("xd_train.sh", ["1"], {"TRAINER": "CoOp", "CFG": "other"}, "trainers/CoOp/other.yaml: expected the config"),
        ("xd_train.sh", ["1"], {"TRAINER": "COOP"}, "UniGRAM VPT VPTGRAM ZeroshotCLIP, found COOP"),
        ("xd_train.sh", ["1"], {"PYTHON": "no-python"}, "found no no-python"),
        ("xd_train.sh", ["1"], {}, "--config configs/gram_meta/coop_vit_b16.yaml -o output/meta/coop_vit_b16`"),
        ("xd_train.sh", ["1"], {"META": "gone.safetensors"}, "gone.safetensors: expected the meta-checkpoint"),
    ],
)
def test_bad_input_is_one_sentence(place, name, words, environment, says):
    done, calls = script(name, place, *words, **environment)
    assert done.returncode == 2 and not calls
    assert says in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*_*.sh")), ids=lambda path: path.name)
def test_help(path, place):
    done, calls = script(path.name, place, "-h", DATA="")
    assert done.returncode == 0 and not calls
    assert done.stdout.startswith(f"Usage: {path.name} ") and "  LOADEP " in done.stdout


def test_a_run_that_fails_ends_the_script(place):
    (place.parent / "interpreter").write_text("#!/bin/sh\nexit 2\n")
    assert script("dg_test.sh", place, "1", TRAINER="CoOp")[0].returncode == 2


@pytest.mark.slow
def test_a_real_run_from_another_folder(tmp_path, tiny_data, tiny_options):
    """Trained, tested, and not run again."""
    variables = {
        **os.environ,
        "DATA": str(tiny_data),
        "PYTHON": sys.executable,
        "TRAINER": "ZeroshotCLIP",
        "SHOTS": "1",
        "BACKBONE": "gram_small",
    }
    command = [BASH, str(SCRIPTS / "base2new_train.sh"), "emoji_food", "1", *tiny_options]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, shlex.join(command) + done.stdout + done.stderr
    folder = tmp_path / "output/base2new/train_base/emoji_food/shots_1/ZeroshotCLIP/gram_small/seed1"
    assert (folder / "results.json").is_file()
