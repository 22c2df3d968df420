"""Run every part of this package on a GPU, compare its numbers with the CPU's, and time it, within some minutes.

    bash scripts/gpu/check.sh -o OUT                  # 8 minutes, random ViT-B/16, random pictures
    bash scripts/gpu/check.sh -o OUT --only CoOp      # the checks with this in their names, and those that they need
    bash scripts/gpu/check.sh -o OUT --device cpu     # random-tiny: to try the script itself

No weights, data or network are needed. checks.yaml lists the checks. Each has a process of its own (Linux alone), in
which nn.DataParallel fails. OUT/check.md and check.json have the results, OUT/logs what the checks printed, OUT/*.json
the numbers of scripts/bench. The exit status is 1 if a check failed.
"""

import argparse
import json
import multiprocessing
import os
import runpy
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from tabulate import tabulate

from gram_meta import cli
from gram_meta.backbone.clip import load_backbone
from gram_meta.files import write_json
from gram_meta.method.memory_plan import MemoryPlan

HERE = Path(__file__).resolve().parent
BENCH = HERE.parent / "bench"
sys.path.insert(0, str(BENCH))
ERRORS = {"fp32": 1e-3, "fp16": 0.05, "amp": 0.05, "bf16": 0.2}  # largest relative L2 errors of losses and gradients
WORDS = ("cat", "dog", "house", "tree", "boat", "lamp")
Check = dict[str, Any]  # an entry of checks.yaml, and the texts that it may name


def checks_of(args: argparse.Namespace) -> dict[str, Check]:
    """Return the checks by name, in the order of checks.yaml; with --only, these and those that they need."""
    book = yaml.safe_load((HERE / "checks.yaml").read_text(encoding="utf-8"))
    texts = book["texts"] | book["cpu" if args.device == "cpu" else "gpu"]
    texts |= {"device": args.device, "cuda": args.device != "cpu", "needs": ""}
    checks = {}
    for template, entry in book["checks"].items():
        kind = next((kind for kind in ("family", "trainer") if f"{{{kind}}}" in template), "")
        for one, its in book.get(kind, {"": {}}).items():
            if one not in entry.get("but", ()):
                check = {**texts, kind: one, **its, **entry}
                checks[template.format(**check)] = check
    wanted = [name for name in checks if not args.only or any(part in name for part in args.only)]
    for name in wanted:  # grows
        wanted += {filled(checks[name], "needs")} - {"", *wanted}
    return {name: check for name, check in checks.items() if name in wanted}


def filled(check: Check, key: str) -> str:
    """Return a text of a check, with what its braces name."""
    text = check[key]
    while "{" in text:
        text = text.format(**check)
    return text


def draw(folder: Path) -> None:
    """Write random pictures of six classes, each with a caption: a corpus, and a dataset for training."""
    random = np.random.default_rng(1)
    for number, word in enumerate(WORDS):
        for part, count in (("train", 16), ("test", 4)):
            (folder / part / word).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (40, 32, 3), dtype=np.uint8) // 2 + 20 * number
                Image.fromarray(pixels).save(folder / part / word / f"{index}.png")
                (folder / part / word / f"{index}.txt").write_text(f"a {word} {word} photo", encoding="utf-8")


def run(name: str, check: Check, output: Path, work: Path) -> None:
    """Run a check in the folder `work`; its output goes to logs/NAME.txt, and what it measured to logs/NAME.json."""
    log = os.open(output / "logs" / f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2), os.chdir(work)
    torch.nn.DataParallel.__init__ = None
    if "compare" in check:
        found = compare(check)
    elif "script" in check:
        found = measure(filled(check, "script").split(), output / f"{name.replace(' ', '_')}.json")
    elif status := cli.main(shlex.split(filled(check, "gram"))):
        sys.exit(status)
    else:
        found = {}
    if check["cuda"]:
        found["peak"] = f"{torch.cuda.max_memory_allocated(check['device']) / 1e6:,.0f} MB"
    write_json(output / "logs" / f"{name}.json", found)


def measure(words: list[str], out: Path) -> dict[str, str]:
    """Run a script of scripts/bench; return the median time and the peak memory of each variant."""
    sys.argv = [*words, "-o", str(out)]
    runpy.run_path(str(BENCH / f"{words[0]}.py"), run_name="__main__")
    report = json.loads(out.read_text(encoding="utf-8"))
    rows = [row for part in report.get("families", {"": report}).values() for row in part.get("measured", {}).items()]
    return {key: f"{1000 * statistics.median(row['seconds']):.1f} ms, {row['peak_mb']:.0f} MB" for key, row in rows}


def compare(check: Check) -> dict[str, str]:
    """Return the largest error of a step's numbers in each precision, relative to float32 on the CPU."""
    torch.backends.cudnn.allow_tf32 = False  # of the patch embedding
    true, largest = numbers(check, "fp32", "cpu"), {}
    for precision in check["precision"].split():
        found = numbers(check, precision, check["device"])
        errors = {what: np.linalg.norm(found[what] - it) / np.linalg.norm(it) for what, it in true.items()}
        print(f"{precision}:", ", ".join(f"{what} {error:.1e}" for what, error in errors.items()))
        largest[precision] = np.max([*errors.values()])  # NaN if one is
    text = {precision: f"{error:.1e}" for precision, error in largest.items()}
    if not all(error <= ERRORS[precision] for precision, error in largest.items()):
        sys.exit(f"relative errors {text}, expected at most {ERRORS}")
    return text


def numbers(check: Check, precision: str, device: str) -> dict[str, np.ndarray]:
    """Return losses and gradients of a meta-step on two tasks, or of a trainer's first step, and its test logits."""
    kind, name = filled(check, "compare").split()
    if kind == "step":
        from contestant import Contestant

        prec = f"TRAINER.{check['node']}.PREC", precision, "USE_CUDA", device != "cpu"
        its = {"entry": argparse.Namespace(trainer=name), "config": check["config"], "weights": check["clip"]}
        its |= {"opts": [*filled(check, "options").split(), *prec], "device": device, "precision": precision}
        its |= {"root": ".", "dataset": "image_folder", "checkout": None, "threads": 0, "test_images": 4}
        return Contestant(argparse.Namespace(**its, folder=f"{name} {precision} {device}")).check()
    from meta_tasks import MetaTasks

    made = MetaTasks(load_backbone(check["clip"], device, precision), name, 2, 2, (1, 2))
    inner = made.inner(scale=256.0 if precision == "fp16" else 1.0)
    found = {"losses": made.add_gradients(MemoryPlan(False, 2, 0, 0), inner).losses}
    for kind, learned in (("theta", made.theta.values()), ("phi", made.regulator.parameters())):
        found[kind] = torch.cat([one.grad.flatten() for one in learned])
    return {name: value.cpu().numpy() for name, value in found.items()}


def attempt(name: str, check: Check, output: Path, work: Path, limit: float) -> dict[str, Any]:
    """Run a check in a process of its own, for so many seconds at most; return how it ended."""
    log, began = output / "logs" / f"{name}.txt", time.perf_counter()
    process = multiprocessing.get_context("fork").Process(target=run, args=(name, check, output, work))
    process.start()
    process.join(limit)
    status, row = process.exitcode, {"state": "failed", "seconds": time.perf_counter() - began}
    if status == 0:
        return row | {"state": "passed", "found": json.loads(log.with_suffix(".json").read_text(encoding="utf-8"))}
    process.kill()
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    last = next((line for line in reversed(lines) if line.strip()), f"it ended with status {status}")
    return row | {"error": f"stopped after {limit:.0f} s; {last}" if status is None else last}


def write(output: Path, facts: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    """Write check.json and check.md; return the latter's text."""
    write_json(output / "check.json", {"facts": facts, "checks": rows})
    states, table = [row["state"] for row in rows.values()], []
    for name, row in rows.items():
        found = row.get("error") or "; ".join(f"{key} {value}" for key, value in row.get("found", {}).items())
        table.append((name, row["state"], row.get("seconds"), found.replace("|", "/")))
    text = "\n".join(f"- {key}: {value}" for key, value in facts.items()) + "\n\n"
    text += ", ".join(f"{states.count(state)} {state}" for state in ("passed", "failed", "not run")) + "\n\n"
    text += tabulate(table, ("check", "state", "seconds", "found"), "pipe", floatfmt=".1f") + "\n"
    (output / "check.md").write_text(text, encoding="utf-8")
    return text


def main() -> int:
    import common

    options = common.plain_parser(__doc__)
    options.add_argument("-o", "--output", type=Path, required=True, help="folder for the results")
    options.add_argument("--minutes", type=float, default=8, help="no check starts later (%(default)s)")
    options.add_argument("--limit", type=float, default=120, help="most seconds of one check (%(default)s)")
    options.add_argument("--device", default="cuda", help="cuda, cuda:1, ..., cpu (%(default)s)")
    options.add_argument("--only", nargs="+", metavar="PART", help="checks with one of these in their names (all)")
    args = options.parse_args()
    end, output, checks = time.monotonic() + 60 * args.minutes, args.output.resolve(), checks_of(args)
    (output / "logs").mkdir(parents=True, exist_ok=True)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]  # CUDA stays unused
    gpu = subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which(query[0]) else "none"
    facts = common.report(argparse.Namespace(device="cpu"))["facts"]
    facts |= {"gpu": gpu, "cuda": torch.version.cuda, "device": args.device}
    rows = {name: {"state": "not run", "error": "no time was left"} for name in checks}
    with tempfile.TemporaryDirectory() as work:
        draw(Path(work, "pictures"))
        for name, check in checks.items():
            left, needs = end - time.monotonic(), filled(check, "needs")
            if needs and rows[needs]["state"] != "passed":
                rows[name]["error"] = f"needs {needs}"
            elif left > 0:
                rows[name] = attempt(name, check, output, Path(work), min(args.limit, left + 30))
            text = write(output, facts, rows)
            print(f"{rows[name]['state']}: {name}", file=sys.stderr, flush=True)
    print(text)
    return int(any(row["state"] == "failed" for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
