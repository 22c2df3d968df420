"""Run every part of this package on a GPU, compare its numbers with the CPU's, and time it, within some minutes.

    bash scripts/gpu/check.sh -o OUT                  # 8 minutes, random ViT-B/16, random pictures
    bash scripts/gpu/check.sh -o OUT --only CoOp      # the checks with this in their names, and those that they need
    bash scripts/gpu/check.sh -o OUT --checkouts DIR  # also against DIR/CoOp and DIR/ProMetaR (with DIR/learn2learn)

checks.yaml lists the checks; each has a process of its own (Linux alone). OUT/logs has the output of each.
"""

import itertools
import multiprocessing.connection
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import yaml
from contestant import Contestant
from meta_tasks import MetaTasks
from PIL import Image
from safetensors.torch import save_file
from tabulate import tabulate

from gram_meta import cli
from gram_meta.backbone.clip import load_backbone
from gram_meta.files import write_json
from gram_meta.method.episodes import Episode
from gram_meta.method.memory_plan import MemoryPlan
from gram_meta.method.outer import BatchResult

# largest relative L2 errors of logits, losses, gradients, and of the change that a step makes to the prompts
ERRORS = {"fp32": 1e-3, "tf32": 0.02, "fp16": 0.05, "amp": 0.05, "bf16": 0.3}
REPLAYED = 0.1  # the share of these by which a replayed graph may differ from the same step without one
Numbers = dict[str, np.ndarray]
Check = dict[str, Any]  # an entry of checks.yaml, and the texts that it may name


def checks_of(args: Namespace) -> dict[str, Check]:
    """Return the checks by name, in the order of checks.yaml; with --only, these and those that they need."""
    book = yaml.safe_load(Path(__file__).with_name("checks.yaml").read_text(encoding="utf-8"))
    checks, gpu, book["checkout"] = {}, args.device != "cpu", book["checkout"] if args.checkouts else {}
    texts = book["texts"] | book["gpu" if gpu else "cpu"] | {"device": args.device, "cuda": gpu}
    for template, entry in book["checks"].items():
        kind = next((kind for kind in ("family", "trainer", "checkout") if f"{{{kind}}}" in template), "")
        for one, its in book.get(kind, {"": {}}).items():
            if one not in entry.get("but", ()):
                check = {**texts, kind: one, **its, **entry}
                checks[template.format(**check)] = check
    wanted = [name for name in checks if not args.only or any(part in name for part in args.only)]
    for name in wanted:  # grows
        wanted += {filled(checks[name], "needs")} - {"", *wanted}
    return {name: check for name, check in checks.items() if name in wanted}


def filled(check: Check, key: str) -> str:
    text = check[key]
    while "{" in text:
        text = text.format(**check)
    return text


def draw(folder: Path, photos: int) -> None:
    """Write random pictures of six classes, each with a caption: a corpus, and a dataset for training.

    `photos` JPEG files of the usual size, with captions, are for measurements; their contents repeat.
    """
    random, words = np.random.default_rng(1), ("cat", "dog", "house", "tree", "boat", "lamp")
    for part, index, (number, word) in itertools.product(("train", "test"), range(16), enumerate(words)):
        place = folder / "pictures" / part / word
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (40, 32, 3), dtype=np.uint8) // 2 + 20 * number
        Image.fromarray(pixels).save(place / f"{index}.png")
        (place / f"{index}.txt").write_text(f"a {word} {word} photo", encoding="utf-8")
    (folder / "photos").mkdir()
    for index in range(photos):
        file = folder / "photos" / f"{index}.jpg"
        file.with_suffix(".txt").write_text("a cat on a lamp", encoding="utf-8")
        if index < 16:
            noise = Image.fromarray(random.integers(0, 256, (47, 63, 3), dtype=np.uint8))
            noise.resize((500, 375), Image.Resampling.BICUBIC).save(file)
        else:
            file.hardlink_to(folder / "photos" / f"{index % 16}.jpg")


def save_weights(shape: str, path: Path) -> None:
    """Write the random weights of all checks in a process of its own, as the checks are forked from this one."""
    process = multiprocessing.get_context("fork").Process(target=_save_weights, args=(shape, path))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{path}: the random weights could not be written")


def _save_weights(shape: str, path: Path) -> None:
    weights = load_backbone(shape).model.state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, path)


def run(name: str, check: Check, output: Path, work: Path, log: Path) -> None:
    """Run a check in the folder `work`, with its output in a file; the process ends with status 0 if it passed."""
    file, found = os.open(log, os.O_WRONLY), ""
    os.dup2(file, 1), os.dup2(file, 2), os.chdir(work)
    torch.nn.DataParallel.__init__ = None  # Dassl's default where there are several GPUs: no check may use it
    if "compare" in check:
        found = f"relative errors {compare(check)}; "
    elif "script" in check:
        sys.argv = [*filled(check, "script").split(), "-o", str(output / f"{name.replace(' ', '_')}.json")]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)  # its processes must find its classes
    elif status := cli.main(shlex.split(filled(check, "gram"))):
        sys.exit(status)
    if check["cuda"]:
        found += f"peak memory {torch.cuda.max_memory_allocated(check['device']) / 1e6:,.0f} MB"
    print(found)


def compare(check: Check) -> str:
    """Return the largest error of a step's numbers in each precision, relative to float32 on the CPU.

    With `again`, the error is that of the same step once more, in a deterministic run, and must be zero.
    """
    true, largest = {} if check["again"] else numbers(check, "fp32", "cpu"), {}
    for precision in check["precision"].split():
        found = numbers(check, precision, check["device"])
        true = numbers(check, precision, check["device"]) if check["again"] else true
        errors = errors_of(found, true)
        print(f"{precision}:", ", ".join(f"{what} {error:.1e}" for what, error in errors.items()))
        largest[precision] = np.max([*errors.values()])  # NaN if one is
    text = ", ".join(f"{precision} {error:.1e}" for precision, error in largest.items())
    bounds = dict.fromkeys(largest, 0.0) if check["again"] else ERRORS
    assert all(error <= bounds[key] for key, error in largest.items()), f"{text}; expected at most {bounds}"
    return text


def errors_of(found: Numbers, true: Numbers) -> dict[str, float]:
    """Return the relative L2 error of each of the true numbers."""
    return {what: float(np.linalg.norm(found[what] - it) / np.linalg.norm(it)) for what, it in true.items()}


def numbers(check: Check, precision: str, device: str) -> Numbers:
    """Return the numbers of meta-steps (`meta_steps`), or of a trainer's first step (`first_step`)."""
    kind, name = filled(check, "compare").split()
    if kind == "step":
        return first_step(check, name, precision, device)
    return meta_steps(check, name, precision, device)


def first_step(check: Check, name: str, precision: str, device: str) -> Numbers:
    """Return a trainer's test logits, the loss and gradients of its first step, and how that changes the prompts."""
    words = f"TRAINER.{check['node']}.PREC {precision} USE_CUDA {device != 'cpu'} {filled(check, 'options')}"
    words += " OPTIM.WARMUP_EPOCH -1"  # at its whole rate the step is larger than the rounding of the prompts
    its = {"entry": Namespace(trainer=name), "config": check["config"], "weights": check["clip"], "root": "."}
    its |= {"folder": f"{name} {precision} {device}", "dataset": "image_folder", "checkout": None, "threads": 0}
    its |= {"device": device, "precision": precision, "test_images": 4}
    contestant = Contestant(Namespace(**its, opts=words.split()))
    model = contestant.trainer.model
    learned = {name: value for name, value in model.named_parameters() if value.requires_grad}
    before = {name: value.detach().clone() for name, value in learned.items()}
    arrays = contestant.check()
    changes = {f"change of {name}": (value.detach() - before[name]).cpu().numpy() for name, value in learned.items()}
    return arrays | changes


def meta_steps(check: Check, name: str, precision: str, device: str) -> Numbers:
    """Return losses and meta-gradients of two episodes of equal shapes; on a GPU a graph of the first is replayed.

    On a GPU, the replays must equal the same steps without a graph, up to `REPLAYED`.
    """
    made = MetaTasks(load_backbone(check["clip"], device, precision), name, 2, 2, (1, 2))
    inner, plan = made.inner(scale=256.0 if precision == "fp16" else 1.0), MemoryPlan(False, 2, 0, 0)
    episodes = {"": made.episode, "second, ": made.other_episode()}
    plain = steps_of(made, lambda episode: made.add_gradients(plan, inner, episode), episodes)
    if device == "cpu":
        return plain
    recorded = made.recorded(plan, inner)
    replayed = steps_of(made, recorded, episodes)
    apart, bound = max(errors_of(replayed, plain).values()), REPLAYED * ERRORS[precision]
    print(f"{precision}: replayed graphs differ from plain steps by {apart:.1e}")
    assert recorded.works and len(recorded.replays) == 1, "expected one CUDA graph for both episodes"
    assert apart <= bound, f"{precision}: replayed graphs differ by {apart:.1e}, expected at most {bound}"
    return replayed


def steps_of(made: MetaTasks, step: Callable[[Episode], BatchResult], episodes: dict[str, Episode]) -> Numbers:
    """Return the losses of a step for each episode, and the gradients of theta and phi."""
    found = {}
    for which, episode in episodes.items():
        made.optimiser.zero_grad(set_to_none=True)
        found[f"{which}losses"] = step(episode).losses.cpu().numpy()
        for index, parameter in enumerate(made.parameters):
            found[f"{which}gradient {index}"] = parameter.grad.cpu().numpy().copy()
    return found


class Attempt:
    """A check in a process of its own, which has so many seconds."""

    def __init__(self, name: str, check: Check, output: Path, work: Path, limit: float) -> None:
        self.log, self.limit, self.alone = output / "logs" / f"{name}.txt", limit, name.startswith("time")
        self.began = time.monotonic()
        self.end = self.began + limit
        self.log.write_bytes(b"")
        words = name, check, output, work, self.log
        self.process = multiprocessing.get_context("fork").Process(target=run, args=words)
        self.process.start()

    def row(self) -> dict[str, Any] | None:
        """Return how the process ended, or None while it runs; a process whose time is over is ended."""
        now, status = time.monotonic(), self.process.exitcode
        if status is None and now < self.end:
            return None
        lines = ["", *(line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip())]
        if status is None or status < 0:
            lines.append(f"killed after {self.limit:g} s" if status is None else f"ended by signal {-status}")
            self.process.kill()
        seconds = round(now - self.began, 1)
        return {"state": "failed" if status != 0 else "passed", "seconds": seconds, "last line": lines[-1]}


def run_all(args: Namespace, checks: dict[str, Check], rows: dict[str, dict[str, Any]], work: Path) -> Iterator[str]:
    """Run the checks in order, --jobs at once, and set their rows; yield the name of each that is over."""
    end, waiting, running = time.monotonic() + 60 * args.minutes, list(checks), dict[str, Attempt]()
    while waiting or running:
        name = waiting[0] if waiting else ""
        alone = name.startswith("time") or any(one.alone for one in running.values())  # a measurement
        needs = filled(checks[name], "needs") if name else ""
        if name and len(running) < (1 if alone else args.jobs) and needs not in running:
            waiting.remove(name)
            left = end - time.monotonic()
            if needs and rows[needs]["state"] != "passed":
                rows[name]["last line"] = f"needs {needs}"
            elif left > 0:
                running[name] = Attempt(name, checks[name], args.output, work, min(args.limit, left + 30))
                continue
            yield name
            continue
        left = min(one.end for one in running.values()) - time.monotonic()
        multiprocessing.connection.wait([one.process.sentinel for one in running.values()], max(left, 0))
        for name, one in list(running.items()):
            if row := one.row():
                rows[name] = row
                del running[name]
                yield name


def write(output: Path, facts: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    """Write check.json and check.md; return the latter's text."""
    write_json(output / "check.json", {"facts": facts, "checks": rows})
    table = [{"check": name} | row | {"last line": row["last line"].replace("|", "/")} for name, row in rows.items()]
    text = "\n".join([*(f"- {key}: {value}" for key, value in facts.items()), "", tabulate(table, "keys", "pipe"), ""])
    for log in (output / "logs" / f"{name}.txt" for name in rows if rows[name]["state"] == "passed"):
        text += f"\n## {log.stem}\n\n{log.read_text()}" if log.stem.startswith("time") else ""
    (output / "check.md").write_text(text, encoding="utf-8")
    return text


def main() -> int:
    options = common.plain_parser(__doc__)
    options.add_argument("-o", "--output", type=Path, required=True, help="folder for the results")
    options.add_argument("--minutes", type=float, default=8, help="no check starts later (%(default)s)")
    options.add_argument("--limit", type=float, default=120, help="most seconds of one check (%(default)s)")
    options.add_argument("--device", default="cuda", help="(%(default)s); cpu: random-tiny, to try the script")
    options.add_argument("--checkouts", type=Path, metavar="DIR", help="folder of the checkouts to time (none)")
    options.add_argument("--only", nargs="+", metavar="PART", help="checks with one of these in their names (all)")
    options.add_argument("--jobs", type=int, default=1, help="checks at once; those of time run alone (%(default)s)")
    args = options.parse_args()
    torch.set_num_threads(max(1, torch.get_num_threads() // args.jobs))
    args.output, checks = args.output.resolve(), checks_of(args)
    (args.output / "logs").mkdir(parents=True, exist_ok=True)
    facts = common.report(Namespace(device="cpu"))["facts"]  # asking a GPU here would keep the checks from using it
    facts["gpu"] = subprocess.getoutput("nvidia-smi --query-gpu=name,driver_version --format=csv,noheader")
    rows = {name: {"state": "not run", "seconds": None, "last line": "no time was left"} for name in checks}
    with tempfile.TemporaryDirectory() as work:
        draw(Path(work), 16 if args.device == "cpu" else 2048)
        if checks:
            one = next(iter(checks.values()))
            save_weights(one["weights"], Path(work, one["clip"]))
        if args.checkouts:
            Path(work, "checkouts").symlink_to(args.checkouts.resolve())
        for name in run_all(args, checks, rows, Path(work)):
            write(args.output, facts, rows)
            print(f"{rows[name]['state']}: {name}", file=sys.stderr, flush=True)
    text = write(args.output, facts, rows)
    states = [row["state"] for row in rows.values()]
    print(text, *(f"{states.count(state)} {state}" for state in ("passed", "failed", "not run")), sep="\n")
    return int("failed" in states)


if __name__ == "__main__":
    sys.exit(main())
