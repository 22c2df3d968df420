"""`gram estimate`: its arithmetic by hand, its parts on a tiny CLIP, and a small real run beside it."""

import json
import time

import numpy as np
import pytest
from PIL import Image

import gram_meta as gram
from gram_meta.cli import main
from gram_meta.tools import estimate as module
from gram_meta.tools.estimate import Rates, Row, as_size, as_time, estimate

SMALL = ("OUTER.BATCH", "2", "TASKS.WAYS", "2", "TASKS.SUPPORT_SHOTS", "1", "TASKS.QUERY_SHOTS", "2")


@pytest.fixture
def rates(monkeypatch):
    """Rates by hand in the place of measurements."""
    found = Rates(decoded=100.0, images=50.0, texts=200.0, captions=400.0, sentence_width=384, has_sentence_model=True)
    monkeypatch.setattr(module, "_measure", lambda *_: found)
    return found


def test_the_arithmetic_by_hand(backbone, rates, monkeypatch):
    monkeypatch.setattr(module, "_step_seconds", lambda *_: (0.5, 1.0))
    opts = (*SMALL, "OUTER.STEPS", "100", "EVAL.EVERY", "50", "EVAL.TASKS", "4")
    _, rows = estimate(backbone, 1000, ["text"], opts=opts)
    by_name = {(row.step, row.what): row for row in rows}
    embed = by_name["embed", "time"]
    assert embed.value == pytest.approx(1000 * (1 / 100 + 1 / 50 + 1 / 200 + 1 / 400)) and embed.origin == "measured"
    assert by_name["embed", "disk"].value == 1000 * (2 * (64 + 384) + 4 + 120)
    # a step: 2 tasks x 2 classes x (4 x 1 + 2 x 2) = 32 passes; an evaluation: 4 x 2 x (2 x 1 + 3 x 2) = 64
    assert by_name["pretrain, text", "time"].value == pytest.approx(0.5 * (100 + 3 * 2))
    weights = sum(value.numel() * value.element_size() for value in backbone.model.state_dict().values())
    assert weights < by_name["pretrain, text", "memory"].value < 2 * weights
    protocol = by_name["base2new, text", "time"]
    images = 176_000 + 134_000
    assert protocol.value == pytest.approx(images / 100 + images / 50 + 2 * 1_570_000 / 200)
    assert all(row.origin in ("measured", "formula", "assumption") and row.how for row in rows)
    assert by_name["cluster", "time"].origin == "assumption"
    many = {(row.step, row.what): row.value for row in estimate(backbone, 10_000, ["text"], opts=opts)[1]}
    assert many["embed", "disk"] == 10 * by_name["embed", "disk"].value
    assert many["pretrain, text", "time"] == by_name["pretrain, text", "time"].value


def test_visual_prompts_cost_passes_and_no_class_prompts(backbone, rates, monkeypatch):
    monkeypatch.setattr(module, "_step_seconds", lambda *_: (0.5, 0.25))
    rows = {(row.step, row.what): row for row in estimate(backbone, 10, ["visual"], opts=SMALL)[1]}
    images = (176_000 + 134_000) / 100
    assert rows["base2new, visual", "time"].value == pytest.approx(images + (2 * 176_000 + 134_000) / 50)
    row = rows["pretrain, visual", "time"]
    assert row.origin == "formula" and "25 % of a step measured" in row.how


def test_a_long_step_is_measured_in_part(backbone, rates):
    """With a tower that is taken to be slow, one task of two classes is measured, and counted by its passes."""
    rates.images = 1e-3
    config = module._config("visual", backbone, "gram_small", ())
    seconds, part = module._step_seconds(backbone, config, rates, 0.0)
    tasks, batch = config.TASKS, config.OUTER.BATCH
    whole = batch * tasks.WAYS * (4 * tasks.SUPPORT_SHOTS + 2 * tasks.QUERY_SHOTS)
    assert part == pytest.approx(2 * (4 + 4) / whole) and seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["text", "joint", "conditional"])
def test_every_kind_of_prompt_takes_steps(backbone, rates, family):
    config = module._config(family, backbone, "gram_small", SMALL)
    seconds, part = module._step_seconds(backbone, config, rates, 0.0)
    assert part == 1 and 0 < seconds < 60


def test_durations_and_sizes_in_words():
    assert [as_time(s) for s in (0.123, 45.0, 150.0, 7300.0, 200_000.0)] == [
        "0.12 s",
        "45 s",
        "2.5 min",
        "2 h",
        "2.3 d",
    ]
    assert as_time(119.0) == "119 s" and as_time(100 * 60 * 1.5) == "2.5 h"
    assert [as_size(n) for n in (1500.0, 2e6, 5.6e9, 123e9, 3e12)] == ["1.5 kB", "2 MB", "5.6 GB", "123 GB", "3 TB"]
    assert str(Row("embed", "disk", 5.6e9, "formula", "x")) == "5.6 GB"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--pairs", "0"], "--pairs: expected at least 1, found 0"),
        (["--pairs", "9", "--prompts", "txt"], "--prompts: expected some of text, visual, joint, conditional, found"),
        (["--pairs", "9", "OUTER.STEP", "1"], "unknown key 'OUTER.STEP'; did you mean"),
        (["--pairs", "9", "--config", "vit_x"], "coop_vit_x: expected a YAML file"),
        (["--pairs", "9", "--backbone", "random-tiny-RN", "--prompts", "visual"], "expected a ViT image tower of"),
        (["--pairs", "9", "--precision", "fp7"], "precision: expected one of"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(arguments, sentence, capsys):
    options = ["--device", "cpu"] + ([] if "--backbone" in arguments else ["--backbone", "random-tiny"])
    assert main(["estimate", *options, *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error


@pytest.mark.slow
def test_the_command_prints_a_table_and_json(monkeypatch, capsys):
    monkeypatch.setattr(module, "_rate", lambda function, count, *_: (function(), 10.0 * count)[1])
    command = [
        "estimate",
        "--pairs",
        "5000",
        "--backbone",
        "random-tiny",
        "--device",
        "cpu",
        "--prompts",
        "text",
        *SMALL,
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("5,000 pairs, random-tiny in fp32 on cpu")
    assert all(word in shown for word in ("pretrain, text", "xd and dg, text", "assumption", "formula"))
    assert main([*command[:-8], "--json", *SMALL]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["pairs"] == 5000 and value["rates"]["decoded"] == 10.0
    assert {row["step"] for row in value["rows"]} >= {"embed", "cluster", "pretrain, text", "base2new, text"}


@pytest.mark.slow
def test_a_small_real_run_takes_about_as_long(backbone, tmp_path):
    """Within a factor of two, at one of three tries: other work on the machine comes and goes."""
    pairs, steps = 150, 30
    content = module._jpeg()
    lines = ["image\tcaption"]
    for number in range(pairs):
        (tmp_path / f"{number}.jpg").write_bytes(content + bytes([number]))
        lines.append(f"{number}.jpg\t{module.CAPTION} {number}")
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    opts = (*SMALL, "OUTER.STEPS", str(steps), "EVAL.EVERY", "30", "EVAL.TASKS", "4")
    ratios = []
    for attempt in range(3):
        rows = estimate(
            backbone, pairs, ["text"], config="gram_small", opts=opts, sentence_model="hash:64", seconds=0.5
        )[1]
        expected = next(row.value for row in rows if (row.step, row.what) == ("embed", "time"))
        began = time.perf_counter()
        gram.embed(tmp_path / "pairs.tsv", tmp_path / f"store{attempt}", backbone=backbone, sentence_model="hash:64",
                   progress=False)  # fmt: skip
        ratios = [(time.perf_counter() - began) / expected]
        expected = next(row.value for row in rows if (row.step, row.what) == ("pretrain, text", "time"))
        config = module._config("text", backbone, "gram_small", opts)
        (tmp_path / f"made{attempt}").mkdir()
        trainer = module._trainer(tmp_path / f"made{attempt}", backbone, config)
        began = time.perf_counter()
        trainer.run()
        ratios.append((time.perf_counter() - began) / expected)
        if all(0.5 < ratio < 2 for ratio in ratios):
            break
    assert all(0.5 < ratio < 2 for ratio in ratios), ratios


def test_the_made_jpeg_is_like_a_photograph():
    import io

    content = module._jpeg()
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (500, 375) and image.format == "JPEG"
    assert 20_000 < len(content) < 200_000 and np.frombuffer(content, np.uint8).std() > 50
