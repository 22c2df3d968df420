"""Disturb the commands for some minutes, and count what survives.

    python tests/soak --minutes 20 --seed 1 -o soak.json      # and soak.md beside it
    python tests/soak --trials "kill embed 17" --seed 1         # single trials again, by their names in the JSON file

Each trial draws from (seed, kind, name, number) alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[threads] = "1"  # threads do not survive a fork, and results are equal at equal numbers of them
os.environ |= {"NUMBA_THREADING_LAYER": "workqueue", "HF_HUB_OFFLINE": "1"}  # the first can be forked
sys.path[0] = str(ROOT / "tests")  # for `soak` and `helpers`, in place of tests/soak

KINDS = ("kill", "writers", "disk", "edit", "fault")
COUNTED = ("tried", "disturbed", "survived", "lost")


def main() -> int:
    from soak import trials
    from soak.edits import Targets
    from soak.world import World

    args = read_arguments()
    warm_up()
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        started = time.monotonic()
        world = World(Path(folder))
        targets = Targets(world)
        kinds = {
            "kill": (trials.kill, list(world.commands)),
            "writers": (trials.writers, list(world.commands)),
            "disk": (trials.disk, list(world.commands)),
            "edit": (targets.trial, list(targets.targets)),
            "fault": (trials.fault, list(trials.FAULTS)),
        }
        skipped = {"disk": why} if (why := trials.mounting_fails()) else {}
        for kind, reason in skipped.items():
            print(f"{kind}: skipped: {reason}")
            del kinds[kind]
        soak = Soak(world, kinds, args.seed)
        for trial in args.trials:
            kind, *name, number = trial.split()
            if kind not in skipped:
                soak.attempt(kind, " ".join(name), int(number))
        if not args.trials:
            soak.run(started + 60 * args.minutes, [kind for kind in args.kinds if kind not in skipped])
    facts = {
        "command": f"python tests/soak --minutes {args.minutes:g} --seed {args.seed}",
        "machine": f"{platform.system()}, Python {platform.python_version()}, {os.cpu_count()} cores",
        "minutes": round((time.monotonic() - started) / 60, 1),
        "skipped": skipped,
        "counts": soak.counts,
        "failures": soak.failures,
        "other_output": sorted(targets.other),
    }
    if args.output:
        args.output.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        args.output.with_suffix(".md").write_text(table(soak.counts), encoding="utf-8")
    print(table(soak.counts))
    return int(bool(soak.failures))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20, help="how long to go on (default: 20)")
    parser.add_argument("--seed", type=int, default=1, help="of all draws (default: 1)")
    parser.add_argument("-o", "--output", type=Path, help="JSON file of the counts; a table goes beside it, as .md")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="some alone")
    parser.add_argument("--trials", nargs="+", default=[], metavar="'KIND NAME NUMBER'", help="only these trials")
    return parser.parse_args()


def warm_up() -> None:
    """Import what the commands import, for a fork to have it; let meta-training print where it begins."""
    import importlib

    import sklearn.cluster  # noqa: F401
    import torch
    import torch.utils.tensorboard  # noqa: F401

    import gram_meta.api  # noqa: F401
    import gram_meta.plugin  # noqa: F401
    from gram_meta.cli import COMMANDS
    from gram_meta.coop import launch  # noqa: F401
    from gram_meta.method.meta_trainer import MetaTrainer

    torch.set_num_threads(1)
    for name in COMMANDS:
        importlib.import_module(f"gram_meta.commands.{name.replace('-', '_')}")
    begin = MetaTrainer.begin

    def printed(self, resume: bool) -> int:
        first = begin(self, resume)
        print(f"soak: goes on after step {first}", flush=True)
        return first

    MetaTrainer.begin = printed  # type: ignore[method-assign]


class Soak:
    """Trials in turn, and their counts."""

    def __init__(self, world, kinds, seed: int) -> None:
        self.world, self.kinds, self.seed = world, kinds, seed
        self.counts: dict[str, dict[str, dict[str, int]]] = {}
        self.failures: list[dict[str, str]] = []

    def run(self, deadline: float, kinds: list[str]) -> None:
        """Go round the kinds and names until the deadline; each reproducer of a fault is run once."""
        number = 0
        while time.monotonic() < deadline:
            for kind in kinds:
                for name in self.kinds[kind][1]:
                    if time.monotonic() < deadline and not (kind == "fault" and number):
                        self.attempt(kind, name, number)
            number += 1

    def attempt(self, kind: str, name: str, number: int) -> None:
        """Make one trial and count it."""
        draw = random.Random(f"{self.seed} {kind} {name} {number}")
        counts = self.counts.setdefault(kind, {}).setdefault(name, dict.fromkeys(COUNTED, 0))
        counts["tried"] += 1
        try:
            counts["disturbed"] += self.kinds[kind][0](self.world, name, draw)
            counts["survived"] += 1
        except Exception as error:  # `Lost`; or a result that cannot even be read
            counts["lost"] += 1
            self.failures.append({"trial": f"{kind} {name} {number}", "what": f"{type(error).__name__}: {error}"})
            print("LOST", *self.failures[-1].values(), flush=True)


def table(counts: dict[str, dict[str, dict[str, int]]]) -> str:
    """Return the counts as a Markdown table."""
    lines = [f"| kind | on | {' | '.join(COUNTED)} |", "|---|---|---|---|---|---|"]
    rows = [(kind, name, count) for kind, names in counts.items() for name, count in names.items()]
    total = {key: sum(count[key] for _, _, count in rows) for key in COUNTED}
    lines += [
        f"| {kind} | {name} | {' | '.join(map(str, count.values()))} |"
        for kind, name, count in [*rows, ("all", "", total)]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
