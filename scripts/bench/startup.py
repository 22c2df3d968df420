"""Time `gram train` from the start of its process to the end of the first step, part by part.

    python scripts/bench/startup.py --device cuda                       # random weights in OpenAI's kind of file
    python scripts/bench/startup.py --device cuda --backbone ViT-B/16   # published weights, in ~/.cache/clip already

CoOp on 16 made-up pictures of each class. Each run is a new process; a first one brings the files into memory.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BEGUN = "GRAM_BENCH_BEGUN"  # when the process that trains was started
FLAGS = "--trainer CoOp --config-file vit_b16_c4_ep10_batch32_ctxv1 --dataset-config-file caltech101 --seed 1"
ENDS = {"build_data_loader": "imports", "load_clip": "data set", "initial_prompts": "CLIP"}  # method: what ends there
ENDS |= {"check_training": "classifier", "before_train": "images checked", "forward_backward": "first batch"}


def train(words: list[str]) -> None:
    """Train up to the end of the first step; print the seconds and the processor's seconds at the end of each part."""
    from gram_meta.coop import launch, register

    parts: dict[str, tuple[float, float]] = {}

    def watched(name: str, method: Any, *args: Any) -> Any:
        parts.setdefault(ENDS[name], (time.time() - float(os.environ[BEGUN]), time.process_time()))
        result = method(*args)
        if name == "forward_backward":
            float(result["loss"])  # waits for a GPU
            parts["first step"] = time.time() - float(os.environ[BEGUN]), time.process_time()
            print(f"\n{BEGUN}{json.dumps(parts)}", flush=True)
            os._exit(0)
        return result

    register.install()
    from gram_meta.trainers.coop import CoOp

    for name in ENDS:
        method = getattr(CoOp, name)
        setattr(CoOp, name, lambda *args, name=name, method=method: watched(name, method, *args))
    sys.exit(launch.main(words))


def main() -> None:
    import common
    import numpy as np
    import torch
    from checkouts import made_up

    from gram_meta.backbone.clip import sizes_of

    options = common.parser(__doc__, ("fp16", "fp32", "amp", "bf16"))
    options.set_defaults(backbone="", precision="fp16", repeats=3)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--classes", type=int, default=47, help="of the data set (%(default)s)")
    args = options.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    rounds: list[dict[str, list[float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        args.backbone = args.backbone or common.save_archive(Path(folder, "random-ViT-B-16.pt"))
        root = made_up(args.classes, 4 * args.classes, 18 * args.classes, Path(folder))
        side = sizes_of(str(args.backbone)).get("image", 224)
        words = f"{FLAGS} --root {root} --backbone {args.backbone} DATASET.NUM_SHOTS 16".split()
        words += f"TRAINER.COOP.PREC {args.precision} DATALOADER.TRAIN_X.BATCH_SIZE {args.batch}".split()
        words += f"INPUT.SIZE ({side},{side})".split()
        words += f"OUTPUT_DIR {folder}/out DATALOADER.NUM_WORKERS 0 USE_CUDA {args.device != 'cpu'}".split()
        command = [sys.executable, __file__, *words]
        for _ in range(1 + args.repeats):
            own = {"OMP_NUM_THREADS": str(torch.get_num_threads()), BEGUN: str(time.time())}
            done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=False)
            if BEGUN not in done.stdout:
                raise SystemExit(done.stdout + done.stderr)
            rounds.append(json.loads(done.stdout.rpartition(BEGUN)[2]))
    print(f"CoOp, {common.environment(args)}\n")
    report = common.report(args)
    ends = np.array([list(one.values()) for one in rounds[1:]])  # (rounds, parts, 2)
    spent = [*np.diff(ends, axis=1, prepend=0).swapaxes(0, 1), ends[:, -1]]
    columns = ({"seconds": common.spread(one[:, 0], 2), "processor": common.spread(one[:, 1], 2)} for one in spent)
    common.print_table([{"": part, **one} for part, one in zip([*rounds[0], "all"], columns, strict=True)])
    common.write_report(args, report | {"rounds": rounds[1:]})


if __name__ == "__main__":
    train(sys.argv[1:]) if BEGUN in os.environ else main()
