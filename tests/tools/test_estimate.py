"""`gram estimate`: its arithmetic by hand, its parts on a tiny CLIP, and a small real run beside it."""

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

import gram_meta as gram
from gram_meta.backbone.clip import load_backbone
from gram_meta.cli import main
from gram_meta.tools import estimate as module
from gram_meta.tools.cards import CARDS, STEP_TFLOP, Card, find_card
from gram_meta.tools.estimate import Rates, Row, as_size, as_time, estimate, read_corpus

SMALL = (
    "OUTER.BATCH",
    "2",
    "TASKS.WAYS",
    "2",
    "TASKS.SUPPORT_SHOTS",
    "1",
    "TASKS.QUERY_SHOTS",
    "2",
    "INNER.STEPS",
    "1",
)


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


@pytest.mark.parametrize(
    ("inner", "passes"),  # of a support image: 4 a step, 2 without a second derivative; an evaluation takes 2 in each
    [
        (("INNER.STEPS", "1"), 4),
        (("INNER.STEPS", "2", "INNER.DETACHED", "3"), 2 * 4 + 3 * 2),
        (("INNER.STEPS", "2", "INNER.FIRST_ORDER", "True"), 2 * 2),
        (("OUTER.META", "False"), 0),
    ],
)
def test_each_inner_step_costs_passes(inner, passes):
    config = module.load_meta_config(["coop_vit_b16"], [*SMALL, *inner])
    assert module._passes(config) == 2 * 2 * (passes * 1 + 2 * 2)


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
        (["--corpus", "cc4m"], "--corpus: expected a path or one of cc3m, cc12m, coco, flickr30k, found nothing at"),
        (["--pairs", "9", "--card", "H1000"], "--card: expected one of H100, H200, A100, L40S, RTX 4090, RTX 3090, V"),
        (["--pairs", "9", "--card", "V100", "--precision", "bf16"], "the V100's, fp32, fp16, found 'bf16'"),
        (["--pairs", "9", "--card", "T4", "--precision", "tf32"], "the T4's, fp32, fp16, found 'tf32'"),
        (["--pairs", "9", "--card", "H100", "--precision", "fp64"], "fp32, fp16, tf32, bf16, found 'fp64'"),
        (["--pairs", "0", "--card", "H100"], "--pairs: expected at least 1, found 0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(arguments, sentence, capsys):
    options = ([] if "--card" in arguments else ["--device", "cpu"]) + (
        [] if "--backbone" in arguments else ["--backbone", "random-tiny"]
    )
    assert main(["estimate", *options, *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "one of the arguments --pairs --corpus is required"),
        (["--pairs", "9", "--corpus", "coco"], "--corpus: not allowed with argument --pairs"),
        (["--pairs", "9", "--card", "H100", "--device", "cpu"], "--device: not allowed with argument --card"),
    ],
)
def test_options_that_exclude_each_other(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.splitlines()[-1].endswith(sentence)


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


# ---------------------------------------------------------------------------------- a corpus and a card by their names


@pytest.fixture(scope="module")
def vit():
    return load_backbone("random-ViT-B/16")


def image_flop(width=768, layers=12, positions=197, patches=196, patch=16, joint=512):
    """FLOP of a forward pass of a ViT: two for each weight and position, and attention's two products."""
    last = 2 * positions * 2 * width**2 + 10 * 2 * width**2  # keys and values of all, all else of the class token
    linear = (layers - 1) * positions * 12 * 2 * width**2 + last
    attention = 2 * 2 * positions * width * ((layers - 1) * positions + 1)
    return patches * 2 * 3 * patch**2 * width + linear + attention + 2 * width * joint


@pytest.mark.slow
def test_the_flop_of_vit_b16(vit):
    whole = 12 * (197 * 24 * 768**2 + 4 * 197**2 * 768) + 196 * 2 * 768 * 768  # with all positions in the last layer
    assert whole == pytest.approx(35e9, rel=0.01) and 0.9 * whole < image_flop() < whole
    counted = module._flop(lambda: vit.encode_images(torch.zeros(1, 3, 224, 224)))
    assert counted == pytest.approx(image_flop(), rel=1e-4)
    assert STEP_TFLOP == pytest.approx(800 * image_flop() / 1e12, rel=1e-3)


@pytest.mark.slow
def test_the_measured_step_comes_out_again(vit):
    """4 tasks of 5 classes, 4 + 12 images each: 771 ms in fp32 and 177 ms in bf16 on the H200, docs/results."""
    opts = ("OUTER.BATCH", "4", "TASKS.WAYS", "5", "TASKS.SUPPORT_SHOTS", "4", "TASKS.QUERY_SHOTS", "12")
    config = module._config("visual", vit, "", opts)
    for precision, seconds in (("fp32", 0.771), ("bf16", 0.177)):
        rates = module._rates_on(find_card("H200", precision), vit, 0.0)
        step, part = module._step_seconds(vit, config, rates, 0.0)
        assert step == pytest.approx(seconds, abs=5e-4) and part == 1
    # text: 4 x 5 classes x 6 passes of 0.7 GFLOP at 148 TFLOP/s are half a millisecond, less than the launches
    text = module._config("text", vit, "", opts)
    assert module._step_seconds(vit, text, rates, 0.0)[0] == pytest.approx(0.008 * (3 * 4 + 2) / 6)
    slow = module._rates_on(find_card("T4", "fp32"), vit, 0.0)
    assert slow.images == pytest.approx(26.16e12 / 0.771 / 67e12 * 8.1e12 / image_flop(), rel=1e-3)
    assert module._step_seconds(vit, text, slow, 0.0)[0] == pytest.approx(4 * 5 * (3 * 4 + 2) / slow.texts)
    joint = module._step_seconds(vit, module._config("joint", vit, "", opts), slow, 0.0)[0]
    assert joint == pytest.approx(1440 / slow.images + 280 / slow.texts)  # three inner steps, too
    assert 0.5e9 < find_card("T4", "fp32").speed / slow.texts < 1e9  # about 8 positions of 76 MFLOP


def test_names_and_speeds_of_cards():
    same = {find_card(name, "bf16") for name in ("RTX 4090", "rtx4090", "nvidia RTX-4090", "NVIDIA  rtx 4090")}
    assert [card.name for card in same] == ["RTX 4090"] and same.pop().memory == 24
    fp32, half = 800 * 0.0327 / 0.771 / 67, 800 * 0.0327 / 0.177 / 990
    assert find_card("A100", "fp32").speed == pytest.approx(fp32 * 19.5e12)
    assert find_card("A100", "fp16").speed == find_card("A100", "bf16").speed == pytest.approx(half * 312e12)
    assert find_card("A100", "tf32").speed == pytest.approx(half * 156e12)
    assert find_card("RTX 3090", "tf32").speed == pytest.approx(fp32 * 35.6e12)  # no slower than fp32
    assert all(find_card(name, "fp16").fp32_speed == find_card(name, "fp32").speed for name in CARDS)


def test_the_rows_of_a_card(backbone, monkeypatch):
    monkeypatch.setattr(module, "worker_count", lambda: 4)
    card = Card("small", 0.0004, 1e9, 1e9, 0.01)
    made = Rates(decoded=100.0, images=50.0, texts=200.0, captions=400.0, card=card)
    monkeypatch.setattr(module, "_rates_on", lambda *_: made)
    opts = (*SMALL, "OUTER.STEPS", "100", "EVAL.EVERY", "50", "EVAL.TASKS", "4")
    listed = estimate(backbone, 1000, ["text", "visual", "conditional"], opts=opts, card=card)[1]
    rows = {(row.step, row.what): row for row in listed}
    assert rows["embed", "time"].value == pytest.approx(1000 * (1 / 50 + 1 / 200 + 1 / 400))  # 4 x 100 are decoded
    # 2 tasks x 2 classes x 6 class prompts / 200; 32 passes / 50; 32 passes x 2 classes / 200; evaluations 3 x 2 steps
    for family, seconds in (("text", 24 / 200), ("visual", 32 / 50), ("conditional", 64 / 200)):
        assert rows[f"pretrain, {family}", "time"].value == pytest.approx(seconds * (100 + 6))
    times = [row for row in listed if row.what == "time" and row.step != "cluster"]
    assert len(times) == 10 and all(row.origin == "assumption" for row in times)
    assert all(row.how.endswith("; H200's efficiency, peak of small") for row in times)
    # half of 0.4 MB holds no task: an image at a time; the weights alone do not fit
    assert "1 images of a side at a time" in rows["pretrain, visual", "memory"].how
    assert rows["pretrain, visual", "memory"].how.endswith("; does not fit into the small's 0.0004 GB")
    made.card = roomy = Card("large", 80, 1e9, 1e9, 1.0)
    fitting = estimate(backbone, 1000, ["visual"], opts=opts, card=roomy)[1]
    assert not any("fit" in row.how for row in fitting)
    by_name = {(row.step, row.what): row for row in fitting}
    assert by_name["pretrain, visual", "time"].value == pytest.approx(1.0 * (100 + 6))  # not faster than its launches
    assert "2 tasks in one pass" in by_name["pretrain, visual", "memory"].how


def test_a_few_shot_step_has_a_least_time(backbone, monkeypatch):
    monkeypatch.setattr(module, "worker_count", lambda: 4)
    fast = Rates(decoded=1e9, images=1e9, texts=1e9, captions=1e9, card=find_card("H100", "fp16"))
    for family, seconds in (("text", 176_000 / 32 * 0.007), ("conditional", 176_000 * 0.004)):
        row = next(module._protocols(family, backbone, fast))
        assert row.value == pytest.approx(seconds, rel=1e-3)
    fast.card = None
    assert next(module._protocols("text", backbone, fast)).value < 1


def test_corpora_by_name_and_by_path(tmp_path, backbone, rates, monkeypatch):
    published = {"CC3M": 3_318_333, "cc12m": 12_423_374, "coco": 591_753, "Flickr30k": 31_783 * 5}
    assert {name: read_corpus(name)[0] for name in published} == published and read_corpus("coco")[1] == []
    lines = ["image\tcaption"]
    for number in range(20):
        Image.new("RGB", (8 + number, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png\t{'' if number == 7 else 'a red square'}")
    (tmp_path / "1.png").write_bytes(b"no image")
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    pairs, images = read_corpus(str(tmp_path / "pairs.tsv"))
    usable = [number for number in range(20) if number != 7][:16]  # the first 16, less the broken one
    assert pairs == 19 and images == [(tmp_path / f"{n}.png").read_bytes() for n in usable if n != 1]
    monkeypatch.setattr(module, "_decoding", lambda given, *_: 10.0 * len(given))
    monkeypatch.setattr(module, "_step_seconds", lambda *_: (0.5, 1.0))
    rows = {(row.step, row.what): row for row in estimate(backbone, pairs, ["visual"], images=images, opts=SMALL)[1]}
    assert rows["embed", "time"].value == pytest.approx(19 * (1 / 150 + 1 / 50 + 1 / 200 + 1 / 400))
    protocol = 310_000 / 100 + (2 * 176_000 + 134_000) / 50  # its images are not the corpus's
    assert rows["base2new, visual", "time"].value == pytest.approx(protocol)
    (tmp_path / "pairs.tsv").write_text("image\tcaption\n1.png\t\n")
    with pytest.raises(gram.GramError, match="pairs.tsv: expected image-text pairs, found none that can be used"):
        read_corpus(str(tmp_path / "pairs.tsv"))


def test_the_command_for_a_card_and_a_corpus(monkeypatch, capsys):
    monkeypatch.setattr(module, "_rate", lambda function, count, *_: (function(), 10.0 * count)[1])
    command = ["estimate", "--corpus", "coco", "--card", "h100", "--precision", "bf16", "--backbone", "random-tiny"]
    assert main([*command, *SMALL]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("coco: 591,753 pairs, random-tiny in bf16 on H100\n")
    assert "H200's efficiency, peak of H100" in shown
    assert main([*command, "--json", *SMALL]) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["corpus"], value["pairs"], value["device"]) == ("coco", 591_753, "H100")
    assert value["rates"]["card"]["memory"] == 80 and value["rates"]["steps"]["text"] == 0.008
