"""Read results.json files, and the logs of the meta-trainings that the runs used, from folders or collections.

A folder with a log.txt of CoOp's kind and no results.json is a run of a CoOp-style checkout: its results are read from
its log (see `gram_meta.report.logs`).

A *collection* is one compact JSON file with all results: `gram report --collect FILE.json OUTPUT_DIRS...`. Configs,
versions and other blocks that many runs share are stored once, by their hash; paths are relative.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial, reduce
from operator import getitem
from pathlib import Path, PurePosixPath
from typing import Any

from gram_meta.config import flatten
from gram_meta.errors import GramError
from gram_meta.files import atomic_write, check_type, parse_json, read_json, read_text, sha256_file, to_json
from gram_meta.method import meta_files
from gram_meta.report.logs import find_logs, result_of_log
from gram_meta.runs import layout
from gram_meta.runs.layout import RESULTS
from gram_meta.runs.schemas import MetaRunFile, check_results

COLLECTION = "gram-report-collection"
FORMAT = 1


@dataclass(frozen=True)
class MetaTraining:
    """One run of `gram pretrain`: its settings, and its log on held-out tasks."""

    path: str  # of best.safetensors
    sha256: str  # of best.safetensors; "" if the file does not exist
    facts: Mapping[str, Any] = field(repr=False)  # run.json: config, version, fingerprints of store and hierarchy
    log: tuple[Mapping[str, float], ...] = field(repr=False)  # log.jsonl

    @property
    def name(self) -> str:
        """The folder's name; `gram bench` and the scripts name it after the meta config."""
        return PurePosixPath(self.path).parent.name


@dataclass
class Evidence:
    """Results by path, in order of paths, and meta-trainings.

    `beside` has the results of trainings outside the given folders whose models were tested in some of `results`.
    """

    results: dict[Path, dict[str, Any]] = field(default_factory=dict)
    beside: dict[Path, dict[str, Any]] = field(default_factory=dict)
    metas: list[MetaTraining] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)  # logs without a result

    def training_of(self, path: Path) -> dict[str, Any]:
        """Return the result of the run that trained the tested model: its settings count, not those of the test.

        This is the run's own result if it trained the model itself, if nothing was trained, or if the training's result
        does not exist.
        """
        trained = self.trained_path(path)
        return self.results[path] if trained is None else (self.results | self.beside)[trained]

    def source_of(self, path: Path) -> str:
        """Return the dataset that the tested model was trained on."""
        result = self.results[path]
        if not result.get("model_dir"):
            return dataset_of(result)
        if self.trained_path(path) is not None:
            return dataset_of(self.training_of(path))
        # OUT/<source>/<TRAINER>/<CFG>_<n>shots/seed<k>; but a base-to-new run's dataset is its own
        parts = PurePosixPath(result["model_dir"].replace(os.sep, "/")).parts
        if result["subsample"] != "all" or len(parts) < 4:
            return dataset_of(result)
        known = {_plain(it["dataset"]): it["dataset"] for it in self.results.values()}
        return known.get(_plain(parts[-4]), dataset_of(result))

    def trained_path(self, path: Path) -> Path | None:
        """Return the path of the results.json beside the tested model; None if there is none."""
        model = self.results[path].get("model_dir")
        if not model:
            return None
        for beside in (Path(model) / RESULTS, Path(model) / layout.LOG):
            beside = self._read_beside(beside)
            if beside in self.results or beside in self.beside:
                return beside if beside != path else None
        return self._same_ending(PurePosixPath(model.replace(os.sep, "/")), path)

    def _read_beside(self, path: Path) -> Path:
        """Return the path, resolved; read it into `beside` if it is a result outside the given folders."""
        if path in self.results or path in self.beside or not path.is_file():
            return path
        path = path.resolve()
        if path not in self.results:
            found = read_result(path) if path.name == RESULTS else result_of_log(path)
            if found:
                self.beside[path] = found
        return path

    def _same_ending(self, model: PurePosixPath, path: Path) -> Path | None:
        """Find a run by the last parts of its path, where the folder was moved or the path is relative."""
        tested = self.results[path]
        same = ("trainer", "seed") if tested["subsample"] == "all" else ("trainer", "seed", "dataset")
        for count in range(min(len(model.parts), 10), 3, -1):
            if match := self._by_ending.get(model.parts[-count:]):
                fits = match != path and all(self.results[match][key] == tested[key] for key in same)
                return match if fits else None
        return None

    @cached_property
    def _by_ending(self) -> dict[tuple[str, ...], Path | None]:
        """The results by the last 4 to 10 parts of their folders; None where two runs have the same."""
        endings: dict[tuple[str, ...], Path | None] = {}
        for found in self.results:
            for count in range(4, min(len(found.parts) - 1, 10) + 1):
                ending = found.parent.parts[-count:]
                endings[ending] = None if ending in endings else found
        return endings


def gather(sources: Iterable[str | Path]) -> Evidence:
    """Read everything in the given folders and collections.

    Raises:
        GramError: a folder without results, a file that is neither a result nor a collection.
    """
    evidence, paths = Evidence(), set()
    for source in map(Path, sources):
        if source.is_file() and source.name != RESULTS:
            _add_collection(evidence, source)
            continue
        found = {path.resolve() for path in ([source] if source.is_file() else source.rglob(RESULTS))}
        logs = {path.resolve() for path in source.rglob(meta_files.LOG)} if source.is_dir() else set()
        from_logs, unfinished = find_logs(source) if source.is_dir() else ({}, [])
        if not found and not logs and not from_logs:
            more = f"; {len(unfinished)} logs of runs that have not finished" if unfinished else ""
            expected = "results.json files, or CoOp's log.txt, in or below this folder"
            raise GramError(f"{source}: expected {expected}, found none{more}")
        evidence.results |= from_logs
        evidence.unfinished += unfinished
        evidence.folders.append(source.resolve())
        evidence.metas += [meta for path in sorted(logs) if (meta := _read_meta(path.parent))]
        paths |= found
    for path in sorted(paths):
        evidence.results[path] = read_result(path)
    evidence.results = dict(sorted(evidence.results.items()))
    _add_metas_of_results(evidence)
    if not evidence.results and not evidence.metas:
        raise GramError("expected results, found none")
    return evidence


def read_result(path: Path) -> dict[str, Any]:
    """Return one results.json."""
    result = check_results(read_json(path), str(path))
    # Another trainer of the family may have evaluated the prompts.
    result["trainer"] = result.get("learned_by") or result["trainer"]
    return result


def dataset_of(result: Mapping[str, Any]) -> str:
    """Return the dataset's name; folders of own images, which share one, have the folder's name added."""
    folder = flatten(result.get("config", {})).get("DATASET.FOLDER")
    return f"{result['dataset']} {folder}" if folder else result["dataset"]


def _plain(name: str) -> str:
    """Return one spelling for a dataset's class and its config: OxfordPets, oxford_pets."""
    plain = name.lower().replace("_", "").replace("-", "")
    return {"dtd": "describabletextures"}.get(plain, plain)


# ------------------------------------------------------------------------------------------------------- Meta-trainings


def _add_metas_of_results(evidence: Evidence) -> None:
    """Read the logs beside the checkpoints that runs name, if their folders exist here."""
    seen = {meta.path for meta in evidence.metas} | {meta.sha256 for meta in evidence.metas if meta.sha256}
    for result in evidence.results.values():
        used = result.get("meta_checkpoint") or {}
        if not used.get("path") or used.get("sha256") in seen:
            continue
        folder = Path(used["path"]).parent.resolve()
        meta = _read_meta(folder) if (folder / meta_files.LOG).is_file() else None
        seen.add(used.get("sha256", ""))
        if meta and meta.path not in seen:
            seen |= {meta.path, meta.sha256}
            evidence.metas.append(meta)


def _read_meta(folder: Path) -> MetaTraining | None:
    """Read a folder of `gram pretrain`; return None if its log.jsonl is something else."""
    facts_file = folder / meta_files.FACTS
    facts = read_json(facts_file, MetaRunFile) if facts_file.is_file() else {}
    path = folder / meta_files.LOG
    lines = enumerate(read_text(path).splitlines(), 1)
    log = [parse_json(line, f"{path}, line {number}", dict[str, float | None]) for number, line in lines]
    if not log or not all("alignment" in row and "step" in row for row in log):
        return None
    checkpoint = folder / meta_files.BEST
    sha256 = sha256_file(checkpoint) if checkpoint.is_file() else ""
    return MetaTraining(str(checkpoint), sha256, facts, tuple(log))


# ---------------------------------------------------------------------------------------------------------- Collections

# Blocks that many runs have in common.
_SHARED = ("config", "versions", "meta_checkpoint", "few_shot", "backbone_fingerprint")
# Config values that a run's result repeats: taken out of the shared config, and restored from the result.
_OWN = {"SEED": "seed", "DATASET.NAME": "dataset", "DATASET.SUBSAMPLE_CLASSES": "subsample"}
_OWN |= {"DATASET.NUM_SHOTS": "shots", "OUTPUT_DIR": "folder"}


def write_collection(evidence: Evidence, path: str | Path) -> None:
    """Write `evidence` as one JSON file, a line per run, with relative paths, so that it can be published."""
    folders = [str(folder if folder.is_dir() else folder.parent) for folder in evidence.folders]
    short = partial(_short, Path(os.path.commonpath(folders)) if folders else None)
    trained = {where: evidence.trained_path(where) for where in evidence.results}
    runs = [_pack(where, result, trained[where], short) for where, result in evidence.results.items()]
    runs += [_pack(where, result, None, short) | {"beside": True} for where, result in evidence.beside.items()]
    shared: dict[str, Any] = {}
    for run in runs:
        for name in _SHARED:
            if block := run.get(name):
                run[name] = block_hash(block)
                shared[run[name]] = block
    metas = [
        {"path": short(meta.path, 2), "sha256": meta.sha256, "facts": meta.facts, "log": _columns(meta.log)}
        for meta in evidence.metas
    ]
    blocks = ",\n".join(f'"{key}": {_compact(block)}' for key, block in shared.items())
    lines = [",\n".join(map(_compact, rows)) for rows in (metas, runs)]
    with atomic_write(path, "w") as file:
        file.write(f'{{"format": "{COLLECTION}", "version": {FORMAT},\n"shared": {{\n{blocks}\n}},\n')
        file.write(f'"metas": [\n{lines[0]}\n],\n"runs": [\n{lines[1]}\n]\n}}\n')


def _add_collection(evidence: Evidence, path: Path) -> None:
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != COLLECTION:
        raise GramError(f"{path}: expected a folder, or a file that `gram report --collect` wrote, found another file")
    if found.get("version") != FORMAT:
        raise GramError(f"{path}: expected a collection of version {FORMAT}, found {found.get('version')}")
    try:
        for packed in found["runs"]:
            beside = packed.pop("beside", False)
            where, result = _unpack(packed, found["shared"])
            check_results(result, f"{path}: {where}")
            before = evidence.results.get(where) or evidence.beside.get(where, result)
            if before != result:
                raise GramError(f"{path}: expected other runs than in the collections before it, found another {where}")
            (evidence.beside if beside else evidence.results)[where] = result
        for meta in found["metas"]:
            log = check_type(tuple(_rows(meta["log"])), tuple[dict[str, float], ...], f"{path}: {meta['path']}")
            check_type(meta["facts"], MetaRunFile, f"{path}: {meta['path']}")
            evidence.metas.append(MetaTraining(str(meta["path"]), str(meta["sha256"]), meta["facts"], log))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise GramError(f"{path}: expected a whole collection, found a broken one ({error!r})") from None


def _pack(path: Path, result: Mapping[str, Any], trained: Path | None, short: Callable[..., str]) -> dict[str, Any]:
    """Return a result with short paths, and a config without the values that the result repeats."""
    packed = dict(result)
    packed["path"] = short(str(path), 8)
    if result.get("model_dir"):
        beside = str(trained.parent) if trained else result["model_dir"]
        packed["model_dir"] = short(beside, 7)
    packed["folder"] = short(str(path.parent), 7)
    if isinstance(packed.get("config"), dict):
        config, own = _without(_map_strings(packed["config"], lambda text: short(text, 2)), _OWN)
        own["OUTPUT_DIR"] = packed["folder"]  # the same folder as a relative path
        other = {key: value for key, value in own.items() if packed[_OWN[key]] != value}
        packed["config"] = config
        packed |= {"own": other} if other else {}
    del packed["folder"]
    for key, parts in (("meta_checkpoint", 2), ("few_shot", 3)):
        block = packed.get(key)
        if isinstance(block, dict) and block.get("path"):
            packed[key] = {**block, "path": short(block["path"], parts)}
    if packed.get("curve"):
        packed["curve"] = _columns(packed["curve"])
    return packed


def _unpack(packed: Mapping[str, Any], shared: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    result = dict(packed)
    where = Path(result.pop("path"))
    for key in _SHARED:
        if isinstance(result.get(key), str) and result[key]:
            result[key] = deepcopy(shared[result[key]])  # for each run
    if isinstance(result.get("config"), dict):
        facts = {**result, "folder": where.parent.as_posix()}
        own = {key: facts[name] for key, name in _OWN.items()} | result.pop("own", {})
        for key, value in own.items():
            *above, name = key.split(".")
            reduce(lambda node, part: node.setdefault(part, {}), above, result["config"])[name] = value
    if isinstance(result.get("curve"), dict):
        result["curve"] = _rows(result["curve"])
    return where, result


def _short(root: Path | None, text: str, parts: int) -> str:
    """Return a path relative to the common folder `root`; of another absolute path, its last `parts`."""
    path = Path(text)
    if not path.is_absolute():
        return text
    if root is not None and path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return "/".join(path.parts[1:][-parts:])


def block_hash(block: Any) -> str:
    """Return the first 12 digits of the SHA-256 of a block's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(block, sort_keys=True).encode()).hexdigest()[:12]


def without_own(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the values that differ between its runs: seed, dataset, classes, shots, folders."""
    return _without(config, (*_OWN, "DATASET.ROOT", "RESUME"))[0]


def _without(config: Mapping[str, Any], keys: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a copy of a nested config without some keys, and their values by dotted names."""
    rest: dict[str, Any] = json.loads(json.dumps(config))  # tuples become lists
    taken = {key: value for key, value in flatten(config).items() if key in keys}
    for key in taken:
        *above, name = key.split(".")
        del reduce(getitem, above, rest)[name]
    return rest, taken


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return rows as one list per key; a value that a row lacks is None."""
    rows = list(rows)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return {key: [row.get(key) for row in rows] for key in keys}


def _rows(columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    count = max(map(len, columns.values()), default=0)
    rows = [{key: column[i] for key, column in columns.items()} for i in range(count)]
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def _compact(value: Any) -> str:
    return to_json(value, "collection", separators=(",", ":"))
