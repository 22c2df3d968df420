"""The steps of the method as functions: what `gram embed`, `cluster`, `pretrain` and `eval-meta` run.

docs/reference/python.md shows them in use. `config` names YAML files: paths, or names of files in configs/gram_meta.
`opts` overrides single keys. Under `torchrun`, `embed` and `pretrain` share their work among the processes, as the
commands do.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gram_meta.clustering.hierarchy import Hierarchy, check_target, finished_before
from gram_meta.config import load_meta_config, stored_config
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError, needs_corpus_extra
from gram_meta.files import PathLike
from gram_meta.locks import only_writer
from gram_meta.processes import device_for, process_group

if TYPE_CHECKING:
    from torch import nn

    from gram_meta.backbone.clip import Backbone
    from gram_meta.method.adaptation import Adaptation
    from gram_meta.method.checkpoint import MetaCheckpoint

Configs = PathLike | Sequence[PathLike]
Options = Mapping[str, Any] | Sequence[str]  # {"OUTER.STEPS": 5000}, or ["OUTER.STEPS", "5000"]


@needs_corpus_extra()
def embed(
    source: PathLike,
    out: PathLike,
    *,
    backbone: str | nn.Module = "ViT-B/16",
    precision: str | None = None,
    sentence_model: str = "all-MiniLM-L6-v2",
    batch_size: int = 64,
    part_size: int = 2048,
    workers: int | None = None,
    crop_on: str = "images",
    device: str = "auto",
    progress: bool = True,
    **source_options: Any,
) -> PairStore:
    """Turn image-text pairs into a store of CLIP and Sentence-BERT features. A finished store is returned as it is.

    Args:
        source: shards, a folder or a file of pairs, or a pattern of files; docs/guide/corpus.md lists the formats.
        out: folder of the store. An interrupted run with the same arguments continues there.
        backbone: an OpenAI name, a weights file, `gram-small`, or a model (see `load_backbone`).
        precision: of CLIP: `fp32`, `fp16` or `bf16`; None: `fp32`, or a model's own.
        sentence_model: a name, or a folder in sentence-transformers' format.
        batch_size: images in one pass.
        part_size: pairs in a part: what an interruption can lose.
        workers: processes that read images; by default one for each core, up to 8, on a GPU, and none on a CPU.
        crop_on: `images` (Pillow's), `tensors`, or `device`: tensors, and JPEG files are also decoded there. The last
            two are faster; pixels differ by at most 1 of 255 on tensors, by a few on a GPU.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto`: cuda where there is one.
        source_options: as for `corpus.sources.open_source`: `format`, `image_column`, `caption_column`, `image_root`,
            `classnames`, `split`, `image_name`.

    Raises:
        GramError: a source that cannot be read, or a folder that holds another store.
    """
    from gram_meta.corpus.embedding.run import check_folder, cropping, embed_pairs, is_finished, remove_leftovers
    from gram_meta.corpus.sources import Source, open_source

    # The tokenizer's threads do not survive the forking of image workers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def unfinished() -> Source | None:
        """Open the source; return None if the store is finished. Cheap errors come before a named CLIP is loaded."""
        opened = open_source(source, **source_options)
        check_folder(out)
        settings = {
            "source": opened.identity(),
            "clip": {
                "name": getattr(clip, "name", backbone),
                "precision": getattr(clip, "precision", precision or "fp32"),
            },
            "sentence_model": {"name": sentence_model},
            "batch_size": batch_size,
            "part_size": part_size,
            **cropping(crop_on),
        }
        # A name stands for its weights, so a finished run is recognised before they are loaded; a file may change.
        by_name = isinstance(backbone, str) and not os.path.exists(backbone) and not os.path.exists(sentence_model)
        if is_finished(out, settings) and by_name:
            remove_leftovers(out)
            print(f"{os.fspath(out)}: finished before, nothing to do", file=sys.stderr)
            return None
        return opened

    with process_group(device or "auto") as group:
        used = device_for(group, device)
        clip = _model(backbone, device, precision)
        opened = group.first(unfinished)
        if opened is not None:
            if crop_on == "device":
                from gram_meta.corpus.on_device import check_decoder

                check_decoder(used)
            from gram_meta.backbone.clip import load_backbone
            from gram_meta.corpus.embedding.sentences import load_sentence_model

            with only_writer(out, group.is_first):
                embed_pairs(
                    opened,
                    out,
                    clip or load_backbone(backbone, used, precision),
                    load_sentence_model(sentence_model, used),
                    batch_size=batch_size,
                    part_size=part_size,
                    workers=workers,
                    crop_on=crop_on,
                    progress=progress,
                    group=group,
                )
    return PairStore.open(out)


@needs_corpus_extra()
def cluster(
    store: PairStore | PathLike,
    out: PathLike,
    *,
    config: Configs = (),
    opts: Options = (),
    exclude: PathLike | None = None,
    force: bool = False,
    progress: bool = True,
) -> Hierarchy:
    """Organise a store into topics and visual domains (CHC, Sec. 3.2), and save the hierarchy.

    Args:
        store: the store, or its folder.
        out: folder of the hierarchy. An interrupted run over a sample continues there; a finished one is not repeated.
        config: files of settings; the keys under CHC and the shots of TASKS are read.
        opts: single settings that replace those of `config`.
        exclude: a .tsv file with a column `image`: locations of images to leave out.
        force: make the hierarchy again, also if it was made from another store or with other settings.

    Raises:
        GramError: unknown settings, a folder that holds something else, too few pairs or topics.
    """
    from gram_meta.clustering.chc import cluster_pairs
    from gram_meta.clustering.sample import Steps
    from gram_meta.clustering.settings import ChcSettings

    settings = load_meta_config(_files(config), _pairs(opts))
    opened = _store(store)
    excluded = opened.rows_of_images(exclude) if exclude else None
    with only_writer(out):
        folder = check_target(out)  # before the work, not after it
        same = (opened, ChcSettings.from_config(settings), excluded)
        hierarchy = None if force else finished_before(folder, *same)
        if hierarchy is not None:
            print(f"{os.fspath(out)}: finished before, nothing to do", file=sys.stderr)
        else:
            hierarchy = cluster_pairs(opened, settings, excluded=excluded, scratch=folder, progress=progress)
            hierarchy.save(folder)
        Steps(folder).forget()
    return hierarchy


@needs_corpus_extra()
def pretrain(
    store: PairStore | PathLike,
    hierarchy: Hierarchy | PathLike,
    out: PathLike,
    *,
    config: Configs = (),
    opts: Options = (),
    backbone: nn.Module | None = None,
    device: str = "auto",
    resume: bool = False,
    progress: bool = True,
) -> MetaCheckpoint:
    """Meta-learn prompts and a gradient regulator (Algorithm 1); return the best meta-checkpoint.

    Args:
        store: from `embed`, or its folder.
        hierarchy: from `cluster`, or its folder.
        out: folder of best.safetensors, last.safetensors, log.jsonl and the state for `resume`.
        config: files of settings of the experiment.
        opts: single settings that replace those of `config`.
        backbone: a model (see `load_backbone`) in the place of BACKBONE.NAME and BACKBONE.PRECISION.
        resume: continue the run in `out`; its final weights equal those of an uninterrupted run.

    Raises:
        GramError: inputs that do not belong together, too few topics, a folder that holds another run.
        Stopped: after SIGTERM; the state is saved.
    """
    from gram_meta.method.checkpoint import load_meta_checkpoint
    from gram_meta.method.together import MetaTrainer, open_trainer

    clip = _model(backbone, device)
    named = ["BACKBONE.NAME", clip.name, "BACKBONE.PRECISION", clip.precision] if clip else []
    settings = load_meta_config(_files(config), [*_pairs(opts), *named])
    if settings.SEEDS:
        raise GramError(f"SEEDS: expected one run here, of SEED, found {settings.SEEDS}; gram pretrain trains several")
    with process_group(device or "auto") as group:
        used = device_for(group, device)
        folders = _folder(store), _folder(hierarchy), out
        best = open_trainer(MetaTrainer, *folders, settings, used, progress, group, clip).run(resume)
    return load_meta_checkpoint(best)


@needs_corpus_extra()
def evaluate(
    meta: MetaCheckpoint | PathLike,
    store: PairStore | PathLike,
    hierarchy: Hierarchy | PathLike,
    *,
    tasks: int = 100,
    steps: Sequence[int] = (0, 1, 5, 20),
    seed: int = 1000,
    opts: Options = (),
    backbone: nn.Module | None = None,
    device: str = "auto",
    progress: bool = True,
) -> Adaptation:
    """Adapt to held-out tasks with R^phi on, off, and off at equal length; `print` shows the result as a table.

    Args:
        meta: a meta-checkpoint, or its file.
        store: the store of `hierarchy`, or its folder.
        hierarchy: where the tasks come from, or its folder; see `method.adaptation.evaluate_adaptation`.
        tasks: number of tasks.
        steps: numbers of inner steps after which the query sets are scored.
        seed: of the draw of the tasks.
        opts: settings that replace those of meta-training.
        backbone: the model of meta-training, if that was given one.
    """
    from gram_meta.method.adaptation import evaluate_adaptation
    from gram_meta.method.checkpoint import MetaCheckpoint, load_meta_checkpoint

    checkpoint = meta if isinstance(meta, MetaCheckpoint) else load_meta_checkpoint(meta)
    opened = _store(store), hierarchy if isinstance(hierarchy, Hierarchy) else Hierarchy.open(hierarchy)
    clip = _model(backbone, device)
    name = clip.name if clip else stored_config(checkpoint.config, _pairs(opts)).BACKBONE.NAME
    checkpoint.check_name(name)
    opened[0].check_backbone_name(name)
    opened[1].check_store(opened[0])
    with process_group(device or "auto") as group:
        used = device_for(group, device)
    return evaluate_adaptation(checkpoint, *opened, tasks, steps, seed, _pairs(opts), used, progress, clip)


def _model(backbone: str | nn.Module | None, device: str, precision: str | None = None) -> Backbone | None:
    """Return a model as a backbone, on its own device unless another is named; None for a name."""
    if backbone is None or isinstance(backbone, str):
        return None
    from gram_meta.backbone.clip import load_backbone

    return load_backbone(backbone, None if device in ("", "auto") else device, precision)


def _store(store: PairStore | PathLike) -> PairStore:
    return store if isinstance(store, PairStore) else PairStore.open(store)


def _folder(opened: PairStore | Hierarchy | PathLike) -> PathLike:
    path = opened.path if isinstance(opened, PairStore | Hierarchy) else opened
    assert path is not None  # `cluster` and `open` set it
    return path


def _files(config: Configs) -> Sequence[str | Path]:
    return [os.fspath(config)] if isinstance(config, str | os.PathLike) else [os.fspath(file) for file in config]


def _pairs(opts: Options) -> list[str]:
    if isinstance(opts, Mapping):
        return [str(word) for pair in opts.items() for word in pair]
    return list(opts)
