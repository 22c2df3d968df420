"""What the benchmarks share: options, names, timing in turns, peak memory, the official text pass, tables and JSON."""

import argparse
import ctypes
import gc
import multiprocessing
import os
import platform
import random
import re
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from gram_meta.backbone.clip import Backbone, clip_module, load_backbone
from gram_meta.files import write_json
from gram_meta.method.checkpoint import MetaCheckpoint, save_meta_checkpoint
from gram_meta.method.prompts import META_NET, initial_meta_net, initial_prompts
from gram_meta.method.regulator import GradientRegulator


def plain_parser(text: str) -> argparse.ArgumentParser:
    """Return a parser without options; the first line of `text` begins its help, the rest ends it."""
    head, _, rest = text.partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=head, epilog=rest, formatter_class=raw)


def parser(text: str, precisions: Sequence[str] = ("fp32", "fp64")) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark that runs the towers."""
    options = plain_parser(text)
    options.add_argument("--backbone", default="random-ViT-B/16", help="as for load_backbone (%(default)s)")
    options.add_argument("--precision", choices=precisions, default="fp32", help="of the towers (%(default)s)")
    options.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    options.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    options.add_argument("--repeats", type=int, default=5, help="rounds; each runs every variant once (%(default)s)")
    options.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time of all threads")
    options.add_argument("-o", "--output", type=Path, help="JSON file for all numbers, round by round")
    return options


def begin(args: argparse.Namespace) -> Backbone:
    """Apply the options and load the backbone, which also sets TF32: with fp32, products and convolutions are exact."""
    if args.clock == "cpu" and torch.device(args.device).type != "cpu":
        raise SystemExit(f"--clock cpu: expected --device cpu, found {args.device}")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.manual_seed(0)
    backbone = load_backbone(args.backbone, args.device, args.precision)
    if args.precision == "fp64":
        for module in backbone.modules():
            if isinstance(module, nn.LayerNorm):  # OpenAI's casts to float32
                module.__class__ = nn.LayerNorm
    return backbone


def environment(args: argparse.Namespace) -> str:
    """Return one line about the model, the machine and the software."""
    gpu = torch.device(args.device).type == "cuda"
    machine = torch.cuda.get_device_name(args.device) if gpu else f"{cpu_model()}, {torch.get_num_threads()} threads"
    software = f"torch {torch.__version__}, Python {platform.python_version()}"
    clock = "processor time" if args.clock == "cpu" else "wall clock"
    return f"{args.backbone}, {args.precision}, {machine}; {software}; {clock}, median of {args.repeats} rounds"


def own_process(begin: Callable[..., object] | None = None, *words: Any) -> ProcessPoolExecutor:
    """Return a new process that runs functions one at a time, first `begin` with these words."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin, words)


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.*)", info.read_text() if info.exists() else "", re.MULTILINE)
    return models[0] if models else platform.processor() or platform.machine()


@dataclass
class Measured:
    """One variant: seconds by round, peak memory in MB above the level before it, and the result of its first run."""

    rounds: list[float]
    peak_mb: float
    result: Any

    @property
    def seconds(self) -> float:
        return statistics.median(self.rounds)


def measure(steps: Mapping[str, Callable[[], Any]], args: argparse.Namespace) -> dict[str, Measured]:
    """Run every step once (warm-up, memory), then all in turns A, B, C, A, B, C, ..., so that noise hits all alike."""
    product_rate(args, 64, 512)  # fills the libraries' own buffers, which no variant should pay for
    measured = {name: Measured([], *with_peak(step, args.device)) for name, step in steps.items()}
    for _ in range(args.repeats):
        for name, step in steps.items():
            measured[name].rounds.append(timed(step, args))
    return measured


def spent(step: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Run a step; return its seconds (wall clock, processor time here and of child processes), and its result."""
    before, result = clocks(), step()
    return {clock: after - before[clock] for clock, after in clocks().items()}, result


def clocks() -> dict[str, float]:
    """Return the seconds of each clock, after the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    processes = {"cpu": time.process_time(), "children": children.ru_utime + children.ru_stime}
    return {"wall": time.perf_counter(), **processes}


def timed(step: Callable[[], object], args: argparse.Namespace) -> float:
    """Run a step and return its seconds on --clock."""
    return spent(step)[0][args.clock]


def product_rate(args: argparse.Namespace, rows: int, width: int) -> float:
    """Return the FLOP/s, float32, of a tower's widest product: (rows, width) by (width, 4 width); median of 20."""
    x, weight = torch.randn(rows, width, device=args.device), torch.randn(4 * width, width, device=args.device)
    seconds = statistics.median(timed(lambda: nn.functional.linear(x, weight), args) for _ in range(20))
    return 2 * rows * width * 4 * width / seconds


def text_flops(backbone: Backbone, positions: int) -> float:
    """Return the FLOP of one pass of the text tower's layers, of 12 d^2 weights each, over so many positions."""
    return 2.0 * positions * 12 * backbone.text_width**2 * len(backbone.model.transformer.resblocks)


def image_passes(backbone: Backbone, prompt_tokens: int) -> tuple[float, float, float]:
    """Return the FLOP of one image in the cheapest exact form: forward, backward, and the tangents of both.

    Linear layers have a multiplication and an addition for each weight and position; attention's products 2 L^2 d each:
    2 forwards, 4 backwards, 12 for tangents, which the second derivative adds. What no prompt has touched has none.
    """
    tower = backbone.model.visual
    d, layers = backbone.visual_width, len(tower.transformer.resblocks)
    patches = tower.positional_embedding.shape[0] - 1
    length = 1 + patches + prompt_tokens
    patch_embedding = 2.0 * patches * tower.conv1.weight.numel()
    last = 2.0 * d**2 * (2 * length + 10)  # keys and values of all, the rest for the class token
    linear = (layers - 1) * 2.0 * length * 12 * d**2 + last + 2.0 * d * backbone.embed_dim
    learned = linear - 2.0 * (length - prompt_tokens) * 3 * d**2
    attention = 2.0 * length * d * ((layers - 1) * length + 1)  # one product in each layer
    return patch_embedding + linear + 2 * attention, learned + 4 * attention, 2 * learned + 12 * attention


def with_peak(step: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Run a step; return its peak in MB above the level before it, and its result.

    The peak is that of the resident set on a CPU (Linux), and that of torch's allocator on CUDA.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = step()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6, result
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # returns memory that earlier steps have freed to the system
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before = status_bytes("VmRSS")
    result = step()
    return (status_bytes("VmHWM") - before) / 1e6, result


def status_bytes(field: str) -> int:
    """Return a size from /proc/self/status, such as VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


class PlainClassText:
    """Class features as CoOp's trainer computes them: all 77 positions of every class through clip's own transformer.

    With `cut`, only as many positions as the longest sentence has; all else stays the same.
    """

    def __init__(self, backbone: Backbone, classnames: Sequence[str], tokens: int, cut: bool = False) -> None:
        self.model = backbone.model
        slots = " ".join(["X"] * tokens)
        ids = backbone.tokenize([f"{slots} {name}." for name in classnames]).to(backbone.device)
        self.ends = ids.argmax(dim=-1)
        self.length = int(self.ends.max()) + 1 if cut else ids.shape[1]
        embeddings = self.model.token_embedding(ids[:, : self.length]).to(self.model.visual.conv1.weight.dtype)
        mask = self.model.build_attention_mask()[: self.length, : self.length]
        self.mask = mask.to(ids.device, embeddings.dtype)
        self.prefix = embeddings[:, :1]  # (N, 1, d)
        self.suffix = embeddings[:, 1 + tokens :]  # (N, L - 1 - M, d)

    def features(self, prompt: Tensor, model: Any = None) -> Tensor:
        """Return (N, D), L2-normalised, for a prompt (M, d), through `model`'s text tower if that is given."""
        model = model or self.model
        for block in model.transformer.resblocks:
            block.attn_mask = self.mask
        x = self.sentences(prompt)  # (N, L, d)
        x = x + model.positional_embedding[: self.length].to(x.dtype)
        x = model.transformer(x.transpose(0, 1)).transpose(0, 1)
        x = model.ln_final(x)[torch.arange(len(x)), self.ends] @ model.text_projection
        return x / x.norm(dim=-1, keepdim=True)

    def sentences(self, prompt: Tensor) -> Tensor:
        """Return token embeddings (N, L, d) with the prompt (M, d) in each sentence."""
        return torch.cat([self.prefix, prompt.expand(len(self.ends), -1, -1), self.suffix], dim=1)


def save_start(path: Path, backbone: Backbone, text: int, visual: int, conditional: bool = False) -> Path:
    """Save a meta-checkpoint of initial prompts with so many tokens and of a new R^phi; return its path."""
    theta = initial_prompts(backbone, text, visual)
    regulator = GradientRegulator({kind: value.shape[-1] for kind, value in theta.items()})
    net = initial_meta_net(backbone) if conditional else {}
    extras = {f"{META_NET}{name}": value for name, value in net.items()}
    save_meta_checkpoint(path, MetaCheckpoint(theta, regulator, backbone.name, backbone.fingerprint, extras=extras))
    return path


def save_archive(path: Path) -> Path:
    """Save random weights of ViT-B/16 as OpenAI publishes its own: a traced module, its matrices in 16 bits."""
    clip, model = clip_module(), load_backbone("random-ViT-B/16").model
    clip.model.convert_weights(model)
    images, texts = torch.randn(1, 3, 224, 224).half(), clip.tokenize(["a cat"])
    inputs = {"forward": (images, texts), "encode_image": images, "encode_text": texts}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.trace_module(model, inputs, check_trace=False).save(str(path))
    return path


def class_names(count: int) -> list[str]:
    """Return class names, the same at every call: ImageNet's, drawn at random below 1,000; then "old ..." and so on."""
    from torchvision.models import ViT_B_16_Weights

    names = list(ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"])
    if count < len(names):
        return random.Random(0).sample(names, count)
    for look in ("old", "red", "small", "wooden", "northern", "painted", "broken", "folded", "hanging"):
        names += [f"{look} {name}" for name in names[:1000]]
    return names[:count]


def topic_words(count: int) -> list[str]:
    """Return single words, as cross-modal hierarchical clustering labels topics (Eq. 3)."""
    return random.Random(1).sample([name for name in class_names(1000) if name.isalpha()], count)


def deviation(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest entry."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Return "median (least to most)", or one value alone."""
    median, least, most = (f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({least} to {most})" if len(values) > 1 else median


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Print a Markdown table of rows {column: cell}; the first column is text, the others are numbers."""
    columns = {column: None for row in rows for column in row}
    align = ("left", *["right"] * (len(columns) - 1))
    print(tabulate(rows, "keys", "pipe", disable_numparse=True, colalign=align, missingval=""), end="\n\n")


def print_comparison(measured: Mapping[str, Measured], names: Sequence[str], **columns: Mapping[str, object]) -> None:
    """Print time, peak memory and speed-up over the first, paired by round. `columns`: further ones, by variant."""
    first, rows = measured[names[0]].rounds, []
    for name in names:
        one = measured[name]
        row = {"": name, "time (ms)": spread([1000 * seconds for seconds in one.rounds])}
        row["speed-up"] = spread([a / b for a, b in zip(first, one.rounds, strict=True)], 2)
        row["peak memory (MB)"] = f"{one.peak_mb:,.0f}"
        rows.append(row | {title: cells.get(name, "") for title, cells in columns.items()})
    print_table(rows)


def numbers(measured: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    return {name: {"seconds": one.rounds, "peak_mb": one.peak_mb} for name, one in measured.items()}


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Return the beginning of a report: date, versions, machine and options, without paths of this machine."""
    return {
        "facts": {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "processor": cpu_model(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name(args.device) if torch.device(args.device).type == "cuda" else None,
            "load_average_before": os.getloadavg(),
        },
        "settings": {key: "given" if isinstance(value, Path) else value for key, value in vars(args).items()},
    }


def write_report(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Write a report to --output, if that is given."""
    report["facts"]["load_average_after"] = os.getloadavg()
    if args.output:
        write_json(args.output, report)
