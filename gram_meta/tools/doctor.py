"""Report what this environment has and lacks, with a command that fixes each problem.

This module imports only Python itself; a check imports what it needs, so a broken package becomes a line of the report.
Each check is a function that yields `Check`s; an exception that it raises becomes a problem. The last check trains for
a step, so packages that only have to work get no check of their own.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gram_meta.errors import GramError, in_one_line
from gram_meta.files import sha256_file

if TYPE_CHECKING:
    from packaging.requirements import Requirement

FINE, NOTE, PROBLEM = "fine", "note", "problem"

DISTRIBUTION = "gram-meta"
CORPUS = f"{DISTRIBUTION}[corpus]"  # training from a finished meta-checkpoint does without
SETUPTOOLS = "setuptools<82"  # the last with the pkg_resources that clip-anytorch imports
CLIP_CACHE = "~/.cache/clip"
MAKE_META = "gram pretrain --help shows how to make one; gram demo makes one in minutes"

PACKAGES = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn"}  # of modules with another name


@dataclass
class Check:
    """A line of the report. `fix` is a command or, where no command helps, an instruction."""

    name: str
    state: str
    found: str
    fix: str = ""


@dataclass
class Environment:
    """The options of the command, and the results of earlier checks that later checks use."""

    root: str = ""
    meta: Sequence[str] = ()
    backbone: str = ""
    output: str = "output"
    verify: bool = False
    traceback: bool = False
    checks: list[Check] = field(default_factory=list)
    fingerprint: str = ""  # of the backbone, where it was loaded

    def has_problem(self, *names: str) -> bool:
        return any(check.state == PROBLEM and check.name in names for check in self.checks)


def examine(environment: Environment) -> list[Check]:
    """Run every check, and return the lines. Only KeyboardInterrupt is raised."""
    for name, check, needs in CHECKS:
        if environment.has_problem(*needs):
            continue
        try:
            with _quiet():
                for line in check(environment):
                    environment.checks.append(line)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - a package may raise anything, SystemExit too, when imported
            environment.checks.append(Check(name, PROBLEM, _sentence(error), _fix_of(error)))
            if environment.traceback:
                traceback.print_exc()
    return environment.checks


def can_run(checks: Sequence[Check]) -> bool:
    """Return whether CoOpGRAM can run here, with the options that were given."""
    return all(check.state != PROBLEM for check in checks)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what packages print and warn while they are imported."""
    output = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        warnings.simplefilter("ignore")
        yield


def check_python(environment: Environment) -> Iterator[Check]:
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    supported = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"] if _version(DISTRIBUTION) else ""
    found = f"{version} on {platform.system()} {platform.machine()}, {sys.executable}"
    if SpecifierSet(supported).contains(version, prereleases=True):
        yield Check("Python", FINE, found)
    else:
        yield Check("Python", NOTE, f"{found}; tried on {supported}")


def check_packages(environment: Environment) -> Iterator[Check]:
    """Compare the version of every requirement of this package."""
    required = _requirements()
    if not required:
        folder = Path(__file__).resolve().parents[2]
        found = f"used from {folder}, not installed; versions of packages are not compared"
        yield Check(DISTRIBUTION, NOTE, found, install("-e", str(folder)))
    wrong = {it: _version(it.name) for it in required if not satisfies(_version(it.name), it)}
    for it, version in wrong.items():
        # check_clip reports on setuptools, and on clip-anytorch where it is missing
        if not it.marker and it.name != "setuptools" and (it.name != "clip-anytorch" or version):
            expected = f"{it.name}{it.specifier}"
            yield Check(it.name, PROBLEM, f"expected {expected}, found {version or 'none'}", install(expected))
    extra = [f"{it.name}{it.specifier} (found {version or 'none'})" for it, version in wrong.items() if it.marker]
    if extra:
        found = f"gram embed, cluster, inspect, pretrain, eval-meta and check-overlap need {', '.join(extra)}"
        yield Check(CORPUS, NOTE, found, install(CORPUS))
    if required and len(extra) == len(wrong):
        yield Check("packages", FINE, f"{DISTRIBUTION} {_version(DISTRIBUTION)} and all its requirements")


def _requirements() -> list[Requirement]:
    """Return what this package and its extra `corpus` require; [] where it is not installed."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or ()]
    except importlib.metadata.PackageNotFoundError:
        return []
    return [it for it in declared if not it.marker or it.marker.evaluate({"extra": "corpus"})]


def _import_problem(name: str, fix: str) -> Check | None:
    """Import a module; return the problem if that fails."""
    try:
        importlib.import_module(name)
    except BaseException as error:  # noqa: BLE001
        absent = isinstance(error, ModuleNotFoundError) and error.name == name
        return Check(name, PROBLEM, "not installed" if absent else f"does not import: {_sentence(error)}", fix)
    return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package) or ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def satisfies(version: str, requirement: str | Requirement) -> bool:
    """Return whether a version meets a requirement such as "numpy>=1.26".

    A nightly build or a pre-release counts as the release that it leads to.
    """
    from packaging.requirements import Requirement
    from packaging.version import InvalidVersion, Version

    try:
        return Requirement(str(requirement)).specifier.contains(Version(version).base_version)
    except InvalidVersion:  # also "", of a package that is not installed
        return False


def install(*words: str) -> str:
    """Return the command that installs something into this very environment."""
    python = shlex.quote(sys.executable or "python")
    arguments = shlex.join(words)
    if importlib.util.find_spec("pip") is None and shutil.which("uv"):
        return f"uv pip install -p {python} {arguments.replace('--force-reinstall', '--reinstall')}"
    return f"{python} -m pip install {arguments}"


def check_torch(environment: Environment) -> Iterator[Check]:
    both = install("--force-reinstall", "torch", "torchvision")
    if problem := _import_problem("torch", both):
        yield problem
        return
    import torch

    threads = torch.get_num_threads()
    yield Check("torch", FINE, f"{torch.__version__}, {threads} CPU {'thread' if threads == 1 else 'threads'}")
    if problem := _import_problem("torchvision", both):
        yield problem
    yield from _devices()


def _devices() -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield Check(f"cuda:{index}", FINE, f"{name}, {_size(free)} of {_size(total)} free")
    elif torch.backends.mps.is_available():
        yield Check("mps", FINE, "Apple's GPU; gram predict uses it with --device mps, training uses the CPU")
    elif Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        fix = "nvidia-smi" if torch.version.cuda else install("--force-reinstall", "torch", "torchvision")
        yield Check("GPU", NOTE, f"torch cannot use the NVIDIA device of this machine; torch is {built}", fix)
    else:
        yield Check("GPU", FINE, "none; everything runs on the CPU")


def check_checkout(environment: Environment) -> Iterator[Check]:
    """Report a CoOp-style checkout here: `gram train` runs its train.py, and its folders come before ours."""
    from gram_meta.coop.checkout import OWN_FOLDERS, find_train_py

    script = find_train_py()
    if script is None:
        return
    folder = script.parent
    sys.path.insert(0, str(folder))  # the later checks import what its train.py would import
    own = ", ".join(f"{name}/" for name in OWN_FOLDERS if (folder / name).is_dir())
    found = f"{folder}: gram train runs its train.py; its {own} are used in place of ours"
    yield Check("checkout", FINE, found)


def check_dassl(environment: Environment) -> Iterator[Check]:
    chosen = os.environ.get("GRAM_DASSL", "")
    fix = "unset GRAM_DASSL" if chosen not in ("", "auto", "builtin") else "export GRAM_DASSL=builtin"
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            from gram_meta import engine

            backend = engine.backend()
    except BaseException as error:  # noqa: BLE001 - someone's Dassl may raise anything
        yield Check("Dassl", PROBLEM, _sentence(error), _advice(str(error)) or fix)
        return
    if backend == "builtin":
        yield Check("Dassl", FINE, "the built-in engine" + (f" (GRAM_DASSL={chosen})" if chosen else ""))
        for line in stderr.getvalue().splitlines():
            if line.startswith("Note: "):
                yield Check("Dassl", NOTE, line.removeprefix("Note: "), _advice(line) or "export GRAM_DASSL=builtin")
        return
    folder = Path(importlib.import_module("dassl").__file__ or "").parent
    yield Check("Dassl", FINE, f"the real Dassl, {folder}")
    for known in engine.fixes():
        if known.applied:
            yield Check(f"Dassl {known.id}", FINE, f"repaired in memory: {known.summary}")


def _advice(message: str) -> str:
    """Return the command that a message about a missing package names, or ""."""
    found = re.search(r"python -m pip install \S+(?=;|$)", message)
    return found[0] if found else ""


def check_clip(environment: Environment) -> Iterator[Check]:
    """Check CLIP's code: OpenAI's, not the clipboard manager of that name, with the pkg_resources that it imports."""
    published = _version("clip-anytorch")
    # Both packages write into the folder clip/: after the other one is removed, clip-anytorch has to be written again.
    again = ("--force-reinstall", "--no-deps") if published else ()
    get = install(*again, "clip-anytorch", SETUPTOOLS)
    if problem := _import_problem("clip", get):
        if "pkg_resources" in problem.found:
            found = f"needs pkg_resources, which setuptools {_version('setuptools') or '(missing)'} does not have"
            problem = Check("clip", PROBLEM, found, install(SETUPTOOLS))
        yield problem
        return
    import clip

    place = getattr(clip, "__file__", None) or next(iter(getattr(clip, "__path__", [])), "an empty folder")
    if not hasattr(clip, "tokenize"):
        python = shlex.quote(sys.executable)
        remove = f"{python} -m pip uninstall -y clip" if "-m pip" in get else f"uv pip uninstall -p {python} clip"
        fix = f"remove or rename {place}" if Path(place).is_relative_to(Path.cwd()) else f"{remove} && {get}"
        yield Check("clip", PROBLEM, f"another package of that name, not CLIP's code: {place}", fix)
        return
    installed = bool(published) and "site-packages" in place
    yield Check("clip", FINE, f"{f'clip-anytorch {published}' if installed else 'the clip of a checkout'}, {place}")


def check_weights(environment: Environment) -> Iterator[Check]:
    """Check the weights of OpenAI's that are in the cache."""
    cached = {name: url for name, url in _published_weights().items() if _cached(url).is_file()}
    for name, url in cached.items():
        yield _check_weights_file(f"CLIP {name}", _cached(url), url, environment.verify)
    if not cached:
        yield Check("CLIP weights", NOTE, f"none of OpenAI's in {CLIP_CACHE}; they are downloaded there at first use")


def _published_weights() -> dict[str, str]:
    """Return the URLs of OpenAI's weights by model name."""
    known = getattr(importlib.import_module("clip.clip"), "_MODELS", {})
    return {name: url for name, url in known.items() if url.startswith("http")}


def _cached(url: str) -> Path:
    return Path(CLIP_CACHE).expanduser() / url.rpartition("/")[2]


def _check_weights_file(name: str, path: Path, url: str, verify: bool) -> Check:
    """Check a cached file: whether it is whole and, with `verify`, whether it has the SHA-256 in the URL."""
    found = f"{path}, {_size(path.stat().st_size)}"
    again = f"rm {shlex.quote(str(path))} && {download(url, path)}"
    if not zipfile.is_zipfile(path):
        return Check(name, NOTE, f"{found}: not whole, or not the published file", again)
    if not verify:
        return Check(name, FINE, f"{found}; contents not compared (--verify)")
    if sha256_file(path) != url.split("/")[-2]:
        return Check(name, NOTE, f"{found}: SHA-256 differs from the published file's", again)
    return Check(name, FINE, f"{found}, SHA-256 as published")


def download(url: str, path: Path) -> str:
    """Return the command that downloads a file."""
    return f"curl -L --create-dirs -o {shlex.quote(str(path))} {url}"


def check_backbone(environment: Environment) -> Iterator[Check]:
    """Load the CLIP of --backbone if its weights are on this machine."""
    name = environment.backbone
    if not name:
        return
    from gram_meta.backbone.clip import load_backbone

    url = _published_weights().get(name, "")
    path = _cached(url)
    if url and not path.is_file():
        yield Check("backbone", NOTE, f"{name} is downloaded to {path} at first use", download(url, path))
        return
    if url and (cached := _check_weights_file("backbone", path, url, verify=False)).state != FINE:
        yield replace(cached, state=PROBLEM)
        return
    if _fits_none(environment):
        yield Check("backbone", NOTE, f"{name} is not loaded, as all meta-checkpoints are for another CLIP")
        return
    try:
        backbone = load_backbone(name)
    except GramError as error:
        yield Check("backbone", PROBLEM, str(error), "gram doctor --backbone ViT-B/16, or a file's path")
        return
    environment.fingerprint = backbone.fingerprint
    sizes = f"{backbone.image_size} px, text width {backbone.text_width}"
    yield Check("backbone", FINE, f"{name} loads: {sizes}, {backbone.fingerprint[:12]}")


def check_datasets(environment: Environment) -> Iterator[Check]:
    """Check the datasets under --root, as `gram check-data` does."""
    if not environment.root:
        return
    root = Path(os.path.abspath(os.path.expanduser(environment.root)))
    if not root.is_dir():
        fix = "gram doctor --root DATA, the folder of the datasets' folders"
        yield Check("datasets", PROBLEM, f"{root}: no such folder", fix)
        return
    import gram_meta.plugin  # noqa: F401 - registers the datasets
    from gram_meta.datasets import check as datasets

    command = f"gram check-data {shlex.quote(str(root))}"
    missing, present = [], 0
    for name, dataset in datasets.find_datasets(root, datasets.known_datasets()):
        finding = datasets.check(root, name, dataset)
        numbers = ", ".join(f"{part} {number:,}" for part, number in finding.images.items())
        present += bool(finding.images)
        if finding.state == datasets.MISSING:
            missing += [name] if name in datasets.PAPER else []
        elif finding.state == datasets.FINE:
            yield Check(f"dataset {name}", FINE, f"{finding.classes} classes, {numbers}")
        else:
            first, *others = finding.problems
            more = f"; and {len(others)} more" if others else ""
            yield Check(f"dataset {name}", NOTE, f"{first}{more}", f"{command} --datasets {name}")
    if not present:
        yield Check("datasets", PROBLEM, f"{root}: expected a known dataset, found none", command)
    elif missing:
        yield Check("datasets", NOTE, f"not under {root}: {', '.join(missing)}", command)


def check_meta(environment: Environment) -> Iterator[Check]:
    """Check the meta-checkpoints of --meta, or those in output/meta, where the documents put them."""
    from gram_meta.method.meta_files import BEST

    named, checks = environment.meta, []
    for path, files in _meta_files(environment).items():
        if named and not files:
            checks.append(Check("meta-checkpoint", NOTE, f"{path}: expected a {BEST}, found none", MAKE_META))
        checks += [_check_meta_file(file, environment) for file in files]
    yield from checks
    if not any(check.state == FINE for check in checks):
        place = "among those of --meta" if named else "below output/meta"
        use = f" for {environment.backbone}" if environment.backbone else ""
        state = PROBLEM if named or (checks and environment.backbone) else NOTE
        yield Check("meta-checkpoint", state, f"none{use} {place}; the GRAM trainers start from one", MAKE_META)


def _meta_files(environment: Environment) -> dict[Path, list[Path]]:
    """Return the meta-checkpoints by the paths of --meta, or those of output/meta."""
    from gram_meta.method.meta_files import BEST

    paths = [Path(os.path.expanduser(path)) for path in environment.meta or ["output/meta"]]
    return {path: sorted(path.rglob(BEST)) if path.is_dir() else [path] if path.exists() else [] for path in paths}


def _fits_none(environment: Environment) -> bool:
    """Return whether there are meta-checkpoints, and all refuse --backbone by name or widths; reads no weights."""
    from gram_meta.method.checkpoint import load_meta_checkpoint

    fits = []
    for file in (file for files in _meta_files(environment).values() for file in files):
        with contextlib.suppress(GramError):  # of a broken file, which check_meta reports
            meta = load_meta_checkpoint(file)
            fits.append(False)
            meta.check_name(environment.backbone)
            fits[-1] = True
    return bool(fits) and not any(fits)


def _check_meta_file(path: Path, environment: Environment) -> Check:
    """Report which backbone a meta-checkpoint is for, and whether that is the one of --backbone."""
    from gram_meta.method.checkpoint import load_meta_checkpoint

    try:
        meta = load_meta_checkpoint(path)
    except Exception as error:  # noqa: BLE001
        return Check("meta-checkpoint", NOTE, _sentence(error), "make it again (gram pretrain), or copy it again")
    tokens = " + ".join(f"{count} {kind}" for kind, count in sorted(meta.tokens.items()))
    regulator = "with R" if meta.regulator is not None else "without R"
    found = f"{path}: for {meta.backbone_name} ({meta.backbone_fingerprint[:12]}), {tokens} tokens, {regulator}"
    try:
        if environment.backbone:
            meta.check_name(environment.backbone)
        if environment.fingerprint in ("", meta.backbone_fingerprint):
            return Check("meta-checkpoint", FINE, found)
    except GramError:
        pass
    fix = f"train with --backbone {shlex.quote(meta.backbone_name)}"
    return Check("meta-checkpoint", NOTE, f"{found}; not for {environment.backbone}", fix)


def check_output(environment: Environment) -> Iterator[Check]:
    """Check that results can be written."""
    path = Path(os.path.abspath(os.path.expanduser(environment.output)))
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        fix = "name another folder with --output-dir"
        yield Check("output", PROBLEM, f"{existing} cannot be written ({error.strerror})", fix)
        return
    yield Check("output", FINE, f"{path}, {_size(shutil.disk_usage(existing).free)} free")


def check_training(environment: Environment) -> Iterator[Check]:
    """Train CoOpGRAM for one regulated step on random weights, with all the code that a real run uses."""
    needed = {it.name for it in _requirements() if not it.marker}
    if environment.has_problem("torch", "torchvision", "clip", "Dassl", *needed):
        yield Check("CoOpGRAM", NOTE, "not tried, because of the problems above")
        return
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gram-doctor-") as folder:
        steps, accuracy = train_tiny(Path(folder))
    if steps < 1 or not 0 <= accuracy <= 100:
        raise RuntimeError(f"expected a regulated step and an accuracy, found {steps} steps and {accuracy}")
    seconds = time.monotonic() - started
    yield Check("CoOpGRAM", FINE, f"trains a regulated step and evaluates (random tiny CLIP), {seconds:.1f} s")


TINY_RUN = """--seed 1 --trainer CoOpGRAM --dataset-config-file image_folder
--config-file gram_small_c4_ep10_batch32_ctxv1 DATASET.FOLDER squares DATASET.NUM_SHOTS 2
MODEL.BACKBONE.NAME random-tiny INPUT.SIZE (32,32) OPTIM.MAX_EPOCH 1 DATALOADER.NUM_WORKERS 0
TRAINER.COOP.PREC fp32 TRAINER.GRAM.CHECKPOINT"""


def train_tiny(folder: Path) -> tuple[int, float]:
    """Train CoOpGRAM for one regulated step on eight images; return (steps that R saw, accuracy in percent)."""
    from PIL import Image

    from gram_meta.backbone.clip import load_backbone
    from gram_meta.coop import launch
    from gram_meta.method.checkpoint import MetaCheckpoint, save_meta_checkpoint
    from gram_meta.method.prompts import initial_prompts
    from gram_meta.method.regulator import GradientRegulator

    for part in ("train", "test"):
        for colour in ("red", "blue"):
            images = folder / "data" / "squares" / part / colour
            images.mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (40, 36), colour).save(images / f"{index}.png")
    backbone = load_backbone("random-tiny")
    prompts = initial_prompts(backbone, 4, 0, "a photo of a")
    regulator = GradientRegulator({"text": backbone.text_width})
    checkpoint = folder / "meta.safetensors"
    save_meta_checkpoint(checkpoint, MetaCheckpoint(prompts, regulator, backbone.name, backbone.fingerprint))
    folders = ["--root", str(folder / "data"), "--output-dir", str(folder / "run")]
    results = launch.train([*folders, *TINY_RUN.split(), str(checkpoint)], quiet=True)
    return results["regulator"]["text"]["steps"], results["metrics"]["accuracy"]


# Name, check, and the names of lines without which it is left out, if they are problems
CHECKS: tuple[tuple[str, Callable[[Environment], Iterator[Check]], tuple[str, ...]], ...] = (
    ("Python", check_python, ()),
    ("packages", check_packages, ()),
    ("torch", check_torch, ()),
    ("checkout", check_checkout, ()),
    ("Dassl", check_dassl, ("torch",)),
    ("clip", check_clip, ("torch",)),
    ("CLIP weights", check_weights, ("torch", "clip")),
    ("backbone", check_backbone, ("torch", "clip")),
    ("datasets", check_datasets, ("torch", "Dassl")),
    ("meta-checkpoint", check_meta, ("torch",)),
    ("output", check_output, ()),
    ("CoOpGRAM", check_training, ()),
)


def _sentence(error: BaseException) -> str:
    """Return an exception's message on one line, with its class unless it is a `GramError`."""
    text = in_one_line(error, 300)
    return text if isinstance(error, GramError) else f"{type(error).__name__}: {text}"


def _fix_of(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        module = error.name.partition(".")[0]
        return install(PACKAGES.get(module, module))
    return install("--force-reinstall", DISTRIBUTION) if isinstance(error, ImportError) else "gram doctor --traceback"


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def as_text(checks: Sequence[Check]) -> str:
    """Return a line for each check, its fix on the line below, and the verdict."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:<7}  {check.name:<{width}}  {check.found}")
        if check.fix:
            lines.append(f"{'':<7}  {'':<{width}}  -> {check.fix}")
    problems = sum(check.state == PROBLEM for check in checks)
    verdict = f"cannot run here as asked: {problems} {'problem' if problems == 1 else 'problems'}."
    return "\n".join([*lines, "", f"CoOpGRAM {verdict if problems else 'can run here.'}"])
