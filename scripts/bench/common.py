"""Functions that the benchmarks share: options, timing in turns, peak memory, CoOp's class encoding, names, tables."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gram_meta.backbone.clip import Backbone, load_backbone
from gram_meta.files import atomic_write
from gram_meta.method.prompts import ClassText, template_features
from gram_meta.method.regulator import GradientRegulator

Step = Callable[[], object]

# --- command line -----------------------------------------------------------------------------------------------------


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark takes."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--backbone", default="random-ViT-B/16", help="as for load_backbone (%(default)s)")
    options.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    options.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    options.add_argument("--repeats", type=int, default=5, help="rounds; each runs every variant once")
    options.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time of all threads, for a machine that others use too (with --threads 1)",
    )
    return options


def begin(args: argparse.Namespace) -> Backbone:
    """Apply the options and load the backbone; exact float32 products on CUDA too, so that results can be compared."""
    if args.clock == "cpu" and torch.device(args.device).type != "cpu":
        raise SystemExit(f"--clock cpu: expected --device cpu, found {args.device}")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    return load_backbone(args.backbone, args.device, getattr(args, "precision", "fp32"))


def environment(args: argparse.Namespace) -> str:
    """Return one line about the machine and the software."""
    if torch.device(args.device).type == "cuda":
        machine = torch.cuda.get_device_name(args.device)
    else:
        machine = f"{cpu_model()}, {torch.get_num_threads()} threads"
    software = f"torch {torch.__version__}, Python {platform.python_version()}"
    clock = "processor time" if args.clock == "cpu" else "wall clock"
    precision = getattr(args, "precision", "fp32")
    return f"{args.backbone}, {precision}, {machine}; {software}; {clock}, median of {args.repeats} rounds"


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


# --- time -------------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """One variant: median seconds, peak memory in MB above the level before it, the step's result, seconds by round."""

    seconds: float
    peak_mb: float
    result: Any
    rounds: list[float]


def measure(steps: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Measured]:
    """Run every step once (warm-up, memory), then all in turns A, B, C, A, B, C, ..., so that noise hits all alike.

    A step is a function, or an object that runs in its own process and has the methods `seconds` and `with_peak`.
    """
    product_rate(args, 64, 512)  # fills the libraries' own buffers, which no variant should pay for
    first = {n: s.with_peak() if hasattr(s, "with_peak") else with_peak(s, args.device) for n, s in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            seconds[name].append(step.seconds() if hasattr(step, "seconds") else timed(step, args))
    return {name: Measured(statistics.median(spent), *first[name], spent) for name, spent in seconds.items()}


def timed(step: Step, args: argparse.Namespace) -> float:
    """Run a step; return its seconds."""
    spent = stopwatch(args)
    step()
    return spent()


def stopwatch(args: argparse.Namespace) -> Callable[[], float]:
    """Start a clock; return a function that gives the seconds since."""
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    synchronise(args.device)
    start = clock()

    def spent() -> float:
        synchronise(args.device)
        return clock() - start

    return spent


def synchronise(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def product_rate(args: argparse.Namespace, rows: int, width: int) -> float:
    """Measure the FLOP/s, float32, of a tower's widest product: (rows, width) by (width, 4 width); median of 20."""
    x = torch.randn(rows, width, device=args.device)
    weight = torch.randn(4 * width, width, device=args.device)
    rates = []
    for _ in range(20):
        spent = stopwatch(args)
        torch.nn.functional.linear(x, weight)
        rates.append(2 * rows * width * 4 * width / spent())
    return statistics.median(rates)


def text_flops(backbone: Backbone, tokens: int) -> float:
    """Return the FLOP of one forward pass's matrix products over so many text positions, without attention's own.

    12 d^2 weights a layer, a multiplication and an addition each. A backward pass to activations alone costs as much.
    """
    return 2.0 * tokens * 12 * backbone.text_width**2 * len(backbone.model.transformer.resblocks)


# --- memory -----------------------------------------------------------------------------------------------------------


def with_peak(step: Step, device: str) -> tuple[float, Any]:
    """Run a step; return its peak in MB above the level before, resident (CPU, Linux) or allocated (CUDA), and its result."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = step()
        synchronise(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6, result
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # return memory that earlier steps have freed to the system
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before = status_bytes("VmRSS")
    result = step()
    return (status_bytes("VmHWM") - before) / 1e6, result


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


# --- the plain way ----------------------------------------------------------------------------------------------------


class PlainClassText:
    """Class features as CoOp's trainer computes them: all 77 positions of every class through clip's own transformer.

    With `cut`, only as many positions as the longest sentence has; all else stays as it is.
    """

    def __init__(self, backbone: Backbone, classnames: Sequence[str], tokens: int, cut: bool = False) -> None:
        self.model = backbone.model
        slots = " ".join(["X"] * tokens)
        ids = backbone.tokenize([f"{slots} {name}." for name in classnames]).to(backbone.device)
        self.ends = ids.argmax(dim=-1)
        self.length = int(self.ends.max()) + 1 if cut else ids.shape[1]
        embeddings = self.model.token_embedding(ids[:, : self.length])
        mask = self.model.build_attention_mask()[: self.length, : self.length]
        self.mask = mask.to(ids.device, embeddings.dtype)
        self.prefix = embeddings[:, :1]  # (N, 1, d)
        self.suffix = embeddings[:, 1 + tokens :]  # (N, L - 1 - M, d)

    def features(self, prompt: Tensor, model: Any = None) -> Tensor:
        """(N, D), L2-normalised, for a prompt (M, d); through another model's text tower than the backbone's, if given."""
        model = model or self.model
        n = len(self.ends)
        for block in model.transformer.resblocks:
            block.attn_mask = self.mask
        x = self.sentences(prompt) + model.positional_embedding[: self.length]  # (N, L, d)
        x = model.transformer(x.transpose(0, 1)).transpose(0, 1)
        x = model.ln_final(x)[torch.arange(n), self.ends] @ model.text_projection
        return x / x.norm(dim=-1, keepdim=True)

    def sentences(self, prompt: Tensor) -> Tensor:
        """Token embeddings (N, L, d) with the prompt (M, d) in each."""
        return torch.cat([self.prefix, prompt.expand(len(self.ends), -1, -1), self.suffix], dim=1)


# --- class names ------------------------------------------------------------------------------------------------------

_WHERE = """American European African Asian Australian Alaskan Siberian Arctic alpine northern southern eastern western
desert mountain river forest Tibetan Welsh Scottish Persian Mexican Brazilian Norwegian""".split()
_LOOK = """great little giant dwarf common wild red grey black white golden spotted striped ringed horned bearded
tailed crested red-breasted black-footed short-haired wire-haired sulphur-crested white-tailed long-eared
three-toed ruby-throated curly-coated""".split()
_ANIMAL = """shark robin owl terrier retriever spaniel hound sheepdog fox wolf bear leopard tiger otter badger weasel
polecat hedgehog porcupine squirrel beaver hare camel llama antelope gazelle ibex bison buffalo monkey gibbon lemur
baboon macaque capuchin elephant panda turtle terrapin lizard chameleon iguana gecko python cobra rattlesnake mamba
frog salamander newt scorpion spider tarantula centipede grouse partridge parrot macaw cockatoo hornbill hummingbird
toucan merganser goose swan stork flamingo heron crane bustard pelican albatross penguin salmon sturgeon eel
butterfly dragonfly damselfly grasshopper cricket beetle weevil ladybug wallaby koala wombat platypus jellyfish
anemone starfish urchin lobster crayfish crab snail slug""".split()
_USE = """wooden electric folding portable stone brick steel paper plastic glass leather silk cotton garden kitchen
office school bathroom sports racing fishing hunting sailing military police fire water wind hand wall table desk
floor street railway picnic""".split()
_THING = """abacus backpack balance ball banjo barrel basket bathtub bench bicycle binoculars boat bookcase bottle bowl
bridge broom bucket buckle cabinet camera candle canoe cannon car carousel castle cello chain chair chest church
cleaver clock cloak coat computer crane crate cradle crib cup curtain dam diaper dome door drum dumbbell envelope
fan fence ferry flagpole flute fountain glove gown grille guillotine hammer hamper harp hatchet helmet holster
hook jacket jar jeep joystick kettle keyboard ladle lamp lantern lawnmower letterbox lighter lipstick loudspeaker
mailbag mask match microphone microwave mitten modem monastery mortar mosque motorcycle nail necklace notebook oboe
organ oven pan parachute pencil perfume phone piano pier pillow pipe pitcher plane plate pole pot printer projector
pump purse quilt racket radiator radio rifle ruler sandal saxophone scale screen screw screwdriver shield shoe
shovel sieve skirt sleeping-bag slipper snorkel snowplow sock sofa spatula stage statue stethoscope stove stretcher
submarine suit sundial sunglasses sunscreen swing switch syringe teapot television tent thimble throne toaster
tractor tray tricycle tripod trombone truck tub turnstile typewriter umbrella vacuum vase vault violin volleyball
wagon wallet wardrobe washbasin whistle wig window wok yurt""".split()
_KIND = """strainer repair-shop dispenser holder cover shade stand opener cleaner cutter case rack grinder truck
boat house machine""".split()


def class_names(count: int) -> list[str]:
    """Return made-up class names, the same at every call, similar in form and length to ImageNet's."""
    draw = random.Random(0)
    forms: list[tuple[float, list[list[str]]]] = [
        (0.09, [_ANIMAL]),
        (0.22, [_THING]),
        (0.22, [_LOOK, _ANIMAL]),
        (0.22, [_USE, _THING]),
        (0.08, [_WHERE, _LOOK, _ANIMAL]),
        (0.02, [_WHERE, _LOOK, _LOOK, _ANIMAL]),
        (0.09, [_THING, _KIND]),
        (0.06, [_USE, _THING, _KIND]),
    ]
    names: dict[str, None] = {}
    while len(names) < count:
        parts = draw.choices([parts for _, parts in forms], [share for share, _ in forms])[0]
        names[" ".join(draw.choice(words) for words in parts)] = None
    return list(names)


def topic_words(count: int) -> list[str]:
    """Return single words, as cross-modal hierarchical clustering labels topics (Eq. 3)."""
    return random.Random(1).sample(_ANIMAL + _THING, count)


def length_facts(backbone: Backbone, names: Sequence[str]) -> str:
    """Return a sentence on the number of CLIP tokens of the names."""
    counts = [int(end) - 1 for end in backbone.tokenize(names).argmax(dim=-1)]
    return f"{len(names)} names of {min(counts)} to {max(counts)} tokens, {statistics.mean(counts):.2f} on average"


# --- results ----------------------------------------------------------------------------------------------------------


def deviation(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest entry."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print Markdown; the first column is text, the others are numbers."""
    print(f"| {' | '.join(header)} |")
    print("|" + " --- |" + " ---: |" * (len(header) - 1))
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row)} |")
    print()


def print_comparison(measured: Mapping[str, Measured], names: Sequence[str]) -> None:
    """Print time and peak memory of these variants, and the speed-up of each over the first."""
    base = measured[names[0]].seconds
    rows = [
        [name, f"{1000 * one.seconds:.0f}", f"{base / one.seconds:.2f}", f"{one.peak_mb:.0f}"]
        for name, one in ((name, measured[name]) for name in names)
    ]
    print_table(["", "time (ms)", "speed-up", "peak memory (MB)"], rows)


# --- a meta-training task ---------------------------------------------------------------------------------------------


def class_side(backbone: Backbone, words: Sequence[str], topics: Tensor, text_tokens: int) -> Any:
    """Return the classes of tasks (B, K): sentences around a text prompt, or fixed features without one."""
    if text_tokens:
        return ClassText(backbone, words, text_tokens).select(topics)
    return template_features(backbone, words)[topics]


def regulator_for(prompts: Mapping[str, Tensor]) -> GradientRegulator:
    """Return a new regulator for these prompts."""
    return GradientRegulator({kind: value.shape[-1] for kind, value in prompts.items()})


# --- JSON -------------------------------------------------------------------------------------------------------------


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a run for its report, without paths of this machine."""
    return {key: "given" if isinstance(value, Path) else value for key, value in vars(args).items()}


def now() -> str:
    """Return the time in UTC, as ISO 8601 to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def write_report(path: Path | None, report: Any) -> None:
    """Write a report as JSON, atomically, if a path is given."""
    if path:
        with atomic_write(path) as file:
            file.write(json.dumps(report, indent=1).encode())
