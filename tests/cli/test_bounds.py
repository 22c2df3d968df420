"""Bounds of settings: one table for meta-training and clustering, one for few-shot runs."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import gram_meta.plugin  # noqa: F401, fills the registries
from gram_meta import engine
from gram_meta.cli import main
from gram_meta.config import META_BOUNDS, RUN_BOUNDS, check_bounds, flatten, get_meta_config, load_meta_config
from gram_meta.coop import launch
from gram_meta.engine.options import complete_cfg, extend_cfg
from gram_meta.errors import GramError
from gram_meta.method.regulator import RegulatorConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs/gram_meta").glob("*.yaml")), sorted((ROOT / "configs/trainers").rglob("*.yaml"))


def run_config(*opts):
    cfg = engine.get_cfg_default()
    extend_cfg(cfg)
    cfg.merge_from_list(list(opts))
    return cfg


def test_every_bound_is_of_a_key_and_every_default_is_within_it():
    meta, run = flatten(get_meta_config()), flatten(run_config())
    assert set(META_BOUNDS) <= set(meta) and set(RUN_BOUNDS) <= set(run)
    assert {key for key, value in meta.items() if type(value) in (int, float)} <= set(META_BOUNDS)
    check_bounds(get_meta_config(), META_BOUNDS)
    check_bounds(run_config(), RUN_BOUNDS)


def test_every_packaged_config_is_within_the_bounds():
    for path in CONFIGS[0]:
        load_meta_config([path])
    for path in CONFIGS[1]:
        args = SimpleNamespace(**vars(launch.build_parser().parse_args(["--config-file", str(path)])))
        complete_cfg(launch.setup_cfg(args))


BAD_META = [
    ("INNER.STEPS", "0", "at least 1 and at most 1,000,000,000, found 0"),
    ("OUTER.STEPS", str(10**26), f"at least 1 and at most 1,000,000,000, found {10**26}"),
    ("OUTER.STEPS", "1e26", None),  # another type
    ("EVAL.EVERY", "0", "at least 1 .* found 0"),
    ("EVAL.TASKS", "0", "at least 1 .* found 0"),
    ("CHECKPOINT.EVERY", "-1", "at least 1 .* found -1"),
    ("SEED", "-1", "at least 0 and at most 4,294,967,295, found -1"),
    ("SEEDS", "(1, -2)", r"whole numbers from 0 .* found \[1, -2\]"),
    ("SEEDS", "(1, 1)", r"whole numbers from 0 .*, each once, .* found \[1, 1\]"),
    ("CHC.SEED", "-2", "-1, or at least 0 .* found -2"),
    ("TASKS.WAYS", "1", "at least 2 .* found 1"),
    ("TASKS.SUPPORT_SHOTS", "0", "at least 1 .* found 0"),
    ("TASKS.QUERY_SHOTS", "0", "at least 1 .* found 0"),
    ("TASKS.HELD_OUT", "1.5", "at least 0 and less than 1, found 1.5"),
    ("INNER.ALPHA", "-0.1", "at least 0 and at most 1,000, found -0.1"),
    ("OUTER.LR_PROMPT", "float('nan')", None),
    ("OUTER.LR_PROMPT", ".nan", None),
    ("OUTER.LR_REGULATOR", "1e26", "at least 0 and at most 1,000, found 1e\\+26"),
    ("OUTER.BATCH", "0", "at least 1 .* found 0"),
    ("OUTER.CLIP_NORM", "-1.0", "at least 0 .* found -1.0"),
    ("OUTER.OPTIMIZER", "lion", "adam or sgd, found 'lion'"),
    ("PROMPT.TEMPLATE", "a photo", "words with {} .* found 'a photo'"),
    ("PROMPT.TEMPLATE", "a {} and a {}", "words with {}"),
    ("PROMPT.TEMPLATE", "a {name}", "words with {}"),
    ("PROMPT.TEMPLATE", "a {{}}", "words with {}"),
    ("PROMPT.TEMPLATE", "a {:>99999999999}", "words with {}"),
    ("PROMPT.TEXT_TOKENS", "-1", "at least 0 .* found -1"),
    ("PROMPT.VISUAL_TOKENS", "100000", "at least 0 and at most 1,000, found 100000"),
    ("LOADER.WORKERS", "-2", "-1, or at least 0 .* found -2"),
    ("LOADER.WORKERS", "1000000", "-1, or at least 0 and at most 512, found 1000000"),
    ("LOADER.PREFETCH", "0", "at least 1 .* found 0"),
    ("MEMORY.BUDGET", "-1.0", "at least 0 .* found -1.0"),
    ("MEMORY.SECOND_ORDER", "half", "auto, whole or lean, found 'half'"),
    ("REGULATOR.GAMMA", "1.0", "more than -1 and less than 1, found 1.0"),
    ("BACKBONE.PRECISION", "fp8", "fp32, tf32, bf16, fp16 or fp64, found 'fp8'"),
    ("CHC.FILTER.KEEP", "0.0", "more than 0 and at most 1, found 0.0"),
    ("CHC.TOPICS.SAMPLE", "99", "0, or at least 100 .* found 99"),
]


@pytest.mark.parametrize(("key", "value", "says"), BAD_META)
def test_values_out_of_bounds_in_meta_training_are_one_sentence(key, value, says):
    with pytest.raises(GramError, match=f"{key}: expected {says or ''}"):
        load_meta_config([], [key, value])


def test_a_number_that_is_none_in_a_file_is_refused(tmp_path):
    for text, found in ((".nan", "nan"), (".inf", "inf"), ("-.inf", "-inf")):
        (tmp_path / "mine.yaml").write_text(f"OUTER: {{LR_PROMPT: {text}}}\n")
        with pytest.raises(
            GramError, match=rf"^OUTER.LR_PROMPT: expected at least 0 and at most 1,000, found {found}$"
        ):
            load_meta_config([tmp_path / "mine.yaml"])


BAD_RUN = [
    ("DATASET.NUM_SHOTS", -2, "at least -1 .* found -2"),
    ("OPTIM.LR", -0.1, "at least 0 and at most 1,000, found -0.1"),
    ("OPTIM.LR", float("nan"), "at least 0 .* found nan"),
    ("OPTIM.LR", float("inf"), "at least 0 .* found inf"),
    ("OPTIM.MOMENTUM", 1.0, "at least 0 and less than 1, found 1.0"),
    ("OPTIM.MAX_EPOCH", 0, "at least 1 .* found 0"),
    ("OPTIM.MAX_EPOCH", 10**26, "at least 1 .* found 1000"),
    ("DATALOADER.TRAIN_X.BATCH_SIZE", 0, "at least 1 .* found 0"),
    ("DATALOADER.TEST.BATCH_SIZE", -3, "at least 1 .* found -3"),
    ("DATALOADER.NUM_WORKERS", -2, "-1, or at least 0 .* found -2"),
    ("DATALOADER.NUM_WORKERS", 1_000_000, "-1, or at least 0 and at most 512, found 1000000"),
    ("INPUT.SIZE", (0, 0), r"\(height, width\) of at least 1 pixel, found \[0, 0\]"),
    ("INPUT.SIZE", (224,), r"\(height, width\) of at least 1 pixel, found \[224\]"),
    ("INPUT.SIZE", (32.5, 32), r"\(height, width\)"),
    ("INPUT.SIZE", ("a", "b"), r"\(height, width\)"),
    ("INPUT.PIXEL_STD", [0.2, 0.0, 0.2], "more than 0 .* found"),
    ("INPUT.PIXEL_STD", [0.2, 0.2], "more than 0 .*, for red, green and blue, found"),
    ("INPUT.PIXEL_MEAN", [0.5], "at least -1,000 .*, for red, green and blue, found"),
    ("INPUT.PIXEL_MEAN", ["a", "b", "c"], "at least -1,000 .* found"),
    ("INPUT.RRCROP_SCALE", (0.9, 0.1), r"\(low, high\), more than 0 and at most 1, found \[0.9, 0.1\]"),
    ("INPUT.RRCROP_SCALE", (0.0, 0.5), r"\(low, high\)"),
    ("INPUT.RRCROP_SCALE", (), r"\(low, high\)"),
    ("INPUT.RRCROP_SCALE", ("a", 1), r"\(low, high\)"),
    ("INPUT.NO_TRANSFORM", True, "False, .* found True"),
    ("INPUT.INTERPOLATION", "lanczos", "bilinear, bicubic or nearest, found 'lanczos'"),
    ("TEST.SPLIT", "train", "val or test, found 'train'"),
    ("TEST.FINAL_MODEL", "best", "last_step or best_val, found 'best'"),
    ("TEST.AT_STEPS", (0, -1), r"whole numbers from 0 .* found \[0, -1\]"),
    ("TEST.AT_STEPS", (0, 1.5), r"whole numbers from 0 .* found \[0, 1.5\]"),
    ("TRAIN.PRINT_FREQ", 0, "at least 1 .* found 0"),
    ("SEED", 2**32, ".* and at most 4,294,967,295, found 4294967296"),
    ("TRAINER.COOP.N_CTX", 0, "at least 1 .* found 0"),
    ("TRAINER.VPT.N_CTX_VISION", 100_000, "at least 1 and at most 1,000, found 100000"),
    ("TRAINER.COOP.PREC", "fp8", "fp32, tf32, fp16, bf16 or amp, found 'fp8'"),
    ("TRAINER.COOP.CLASS_TOKEN_POSITION", "last", "end, middle or front, found 'last'"),
    ("TRAINER.MEMORY.CHECKPOINTING", "on", "auto, always or never, found 'on'"),
    ("TRAINER.MEMORY.CLASSES", -1, "at least 0 .* found -1"),
    ("TRAINER.MEMORY.TEXT_BUDGET", -1.0, "at least 0 .* found -1.0"),
    ("TRAINER.MEMORY.IMAGE_BUDGET", -2.0, "at least 0 .* found -2.0"),
    ("TRAINER.MEMORY.KEPT_IMAGES", -1.0, "at least 0 .* found -1.0"),
    ("TRAINER.GRAM.STEP_SCALE", -1.0, "at least 0 .* found -1.0"),
]


@pytest.mark.parametrize(("key", "value", "says"), BAD_RUN)
def test_values_out_of_bounds_in_a_run_are_one_sentence(key, value, says):
    with pytest.raises(GramError, match=f"^{key}: expected {says}"):
        complete_cfg(run_config(key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [("DATASET.NUM_SHOTS", -1), ("DATASET.NUM_SHOTS", 0), ("SEED", -1), ("SEED", -5), ("OPTIM.WARMUP_EPOCH", -1)],
)
def test_values_with_a_meaning_of_their_own_in_coop_are_allowed(key, value):
    complete_cfg(run_config(key, value))


def test_the_command_line_refuses_before_anything_is_written(tmp_path, tiny_data, tiny_options, capsys):
    flags = ["--root", tiny_data, "--trainer", "CoOp", "--output-dir", tmp_path / "out", "DATASET.NAME", "EmojiFood"]
    assert main(["train", *map(str, flags), *tiny_options, "OPTIM.LR", "-1.0"]) == 2
    assert "OPTIM.LR: expected at least 0 and at most 1,000, found -1.0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"start": "off"}, {"gamma": 1.5}, {"gamma": float("nan")}, {"gamma": "x"}])
def test_a_regulator_of_a_file_has_the_same_bounds(changes):
    with pytest.raises(GramError, match=f"REGULATOR.{next(iter(changes)).upper()}: expected"):
        RegulatorConfig(**changes)
