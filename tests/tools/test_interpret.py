"""`gram interpret`: nearest words of prompts that were put together from known words."""

import csv
import io
import json
import os
import subprocess
import sys

import pytest
import torch

from gram_meta.backbone.clip import load_backbone
from gram_meta.cli import main
from gram_meta.errors import GramError
from gram_meta.files import write_json
from gram_meta.method.checkpoint import MetaCheckpoint, save_meta_checkpoint
from gram_meta.method.prompts import context_from_words
from gram_meta.runs.layout import choose_checkpoint
from gram_meta.runs.reader import read_saved
from gram_meta.tools.interpret import interpret, nearest_rows


def checkpoint(folder, tensors, epoch=2, name="prompt_learner", **more):
    path = folder / name / f"model.pth.tar-{epoch}"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": tensors, "epoch": epoch, **more}, path)
    return path


def moved(context, by=0.1):
    """A context that is nearer to its words than to any others: random-tiny's embeddings are 0.16 from each other."""
    return context + by * 0.02 * torch.ones_like(context)


def nearest_by_hand(context, embedding, k):
    """One token after another, by the formula, in float64."""
    found = []
    for token in context.double():
        distances = ((embedding.double() - token) ** 2).sum(1).sqrt()
        order = sorted(range(len(distances)), key=lambda i: float(distances[i]))[:k]
        found.append([(i, float(distances[i])) for i in order])
    return found


def words_of(found):
    table = {}
    for word in found.words:
        table.setdefault((word.class_index, word.token), []).append(word.word)
    return table


@pytest.mark.slow
def test_a_context_of_words_gives_these_words(tmp_path, backbone):
    context = moved(context_from_words(backbone, "a photo of a"))
    checkpoint(tmp_path, {"ctx": context, "token_prefix": torch.zeros(3, 1, 64)})
    write_json(tmp_path / "results.json", {"trainer": "CoOp", "backbone": "random-tiny"})
    found = interpret(tmp_path, topk=3)
    assert [words[0] for words in words_of(found).values()] == ["a", "photo", "of", "a"]
    assert [word.rank for word in found.words] == [1, 2, 3] * 4 and found.remarks == []
    expected = nearest_by_hand(context, backbone.model.token_embedding.weight, 3)
    for word in found.words:
        token, distance = expected[word.token - 1][word.rank - 1]
        assert word.id == token and word.distance == pytest.approx(distance, rel=1e-5)
    assert found.words[3].piece == "photo</w>" and found.saved.trainer == "CoOp" and found.saved.epoch == 2


def test_distances_stay_exact_near_a_word(backbone):
    embedding = backbone.model.token_embedding.weight
    context = embedding[[320, 1125]].clone()
    context[1, 0] += 1e-5
    distances, indices = nearest_rows(context, embedding, 1)
    assert indices.flatten().tolist() == [320, 1125]
    assert distances[0, 0] == 0 and distances[1, 0].item() == pytest.approx(1e-5, rel=0.05)


@pytest.mark.slow
def test_a_context_per_class_is_printed_per_class(tmp_path, backbone):
    contexts = torch.stack([context_from_words(backbone, "a photo"), context_from_words(backbone, "two dogs")])
    path = checkpoint(tmp_path, {"ctx": moved(contexts)}, classnames=["cat", "dog"])
    found = interpret(path, topk=1, backbone="random-tiny")
    assert words_of(found) == {(0, 1): ["a"], (0, 2): ["photo"], (1, 1): ["two"], (1, 2): ["dogs"]}
    assert {(word.class_index, word.classname) for word in found.words} == {(0, "cat"), (1, "dog")}


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("text",), ("text", "visual")])
def test_meta_checkpoints_name_their_backbone(tmp_path, backbone, kinds):
    prompts = {"text": moved(context_from_words(backbone, "a photo of a")), "visual": torch.zeros(2, 64)}
    meta = MetaCheckpoint({k: prompts[k] for k in kinds}, None, "random-tiny", backbone.fingerprint)
    save_meta_checkpoint(tmp_path / "best.safetensors", meta)
    for path in (tmp_path, tmp_path / "best.safetensors"):  # the folder of a meta-training, or the file
        found = interpret(path, topk=1)
        assert [word.word for word in found.words] == ["a", "photo", "of", "a"]
        assert found.remarks == (["2 visual tokens beside them have no words"] if "visual" in kinds else [])
    with pytest.raises(GramError, match="the backbone it was made with, random-tiny, found 'random-tiny-RN'"):
        interpret(tmp_path, backbone="random-tiny-RN")


def test_visual_prompts_have_no_words(tmp_path, backbone, capsys):
    meta = MetaCheckpoint({"visual": torch.zeros(2, 64)}, None, "random-tiny", backbone.fingerprint)
    save_meta_checkpoint(tmp_path / "visual.safetensors", meta)
    assert main(["interpret", str(tmp_path / "visual.safetensors")]) == 2
    printed = capsys.readouterr().err
    assert "found visual_ctx (a visual prompt, which has no words)" in printed and len(printed.splitlines()) == 1
    for name in ("visual_ctx", "image_encoder.VPT"):
        with pytest.raises(GramError, match="which has no words"):
            interpret(checkpoint(tmp_path, {name: torch.zeros(2, 64)}), backbone="random-tiny")


@pytest.mark.slow
def test_conditional_and_whole_model_checkpoints(tmp_path, backbone):
    context = moved(context_from_words(backbone, "of a"))
    path = checkpoint(tmp_path / "1", {"ctx": context, "meta_net.linear1.weight": torch.zeros(4, 64)})
    found = interpret(path, topk=1, backbone="random-tiny")
    assert words_of(found) == {(None, 1): ["of"], (None, 2): ["a"]} and "meta-net" in found.remarks[0]
    tensors = {"module.prompt_learner.ctx": context, "module.prompt_learner.compound_prompts_text.0": context}
    path = checkpoint(tmp_path / "2", tensors, name="MultiModalPromptLearner")
    found = interpret(path.parent.parent, topk=1, backbone="random-tiny")
    assert words_of(found) == {(None, 1): ["of"], (None, 2): ["a"]} and "deeper layers" in found.remarks[0]


LOG = """***************
** Arguments **
***************
eval_only: False
model_dir: {model_dir}
************
** Config **
************
MODEL:
  BACKBONE:
    NAME: random-tiny
    PRETRAINED: True
  INIT_WEIGHTS:{space}
TEST:
  FINAL_MODEL: {final}
TRAINER:
  NAME: CoOp
Collecting env info ...
"""


@pytest.mark.slow
def test_the_log_of_a_coop_checkout_names_the_backbone(tmp_path, backbone):
    run = tmp_path / "seed1"
    for epoch, words in ((5, "two dogs"), (50, "a photo")):
        checkpoint(run, {"ctx": moved(context_from_words(backbone, words))}, epoch=epoch)
    log = LOG.format(final="last_step", model_dir="", space=" ")
    (run / "log.txt").write_text(log)
    found = interpret(run, topk=1)
    assert [word.word for word in found.words] == ["a", "photo"]  # the last by number
    assert found.backbone == "random-tiny" and found.saved.trainer == "CoOp"
    assert [word.word for word in interpret(run, topk=1, epoch=5).words] == ["two", "dogs"]
    with pytest.raises(GramError, match=r"expected a checkpoint of epoch 7 \(--load-epoch\), found epochs 5, 50"):
        interpret(run, epoch=7)
    best = {"ctx": moved(context_from_words(backbone, "house boat"))}
    torch.save({"state_dict": best, "epoch": 9}, run / "prompt_learner" / "model-best.pth.tar")
    for final in ("last_step", "best_val"):  # CoOp's load_model takes model-best.pth.tar, whatever its run ended with
        (run / "log.txt").write_text(LOG.format(final=final, model_dir="", space=""))
        assert [word.word for word in interpret(run, topk=1).words] == ["house", "boat"]
        assert choose_checkpoint(run)[0].name == "model-best.pth.tar"  # what `--eval-only --model-dir` loads
        assert read_saved(run).path == choose_checkpoint(run)[0]  # what `gram predict` loads
    write_json(run / "run.json", {"run": {"TEST.FINAL_MODEL": "last_step", "MODEL.BACKBONE.NAME": "random-tiny"}})
    assert [word.word for word in interpret(run, topk=1).words] == ["a", "photo"]  # a run of ours that ended otherwise
    (run / "run.json").unlink()
    tested = tmp_path / "test_new"
    tested.mkdir()
    (tested / "log.txt").write_text(LOG.format(final="last_step", model_dir=run, space=" "))
    assert [word.word for word in interpret(tested, topk=1).words] == ["house", "boat"]  # of the run it evaluates


@pytest.mark.slow
def test_tokens_that_share_one_embedding_are_no_words(tmp_path):
    clip = load_backbone("gram-small")  # most of its vocabulary was never trained: those rows hold the mean
    table = clip.model.token_embedding.weight
    shared = table[clip.tokenize(["sesquipedalian"])[0, 1:-1]]
    rows, counts = table.unique(dim=0, return_counts=True)
    middle = rows[counts.argmax()]
    assert counts.max() > 40_000 and (shared == middle).all(1).any()
    found = interpret(checkpoint(tmp_path, {"ctx": middle[None]}), topk=3, backbone="gram-small")
    assert "46946 of 49408 tokens" in found.remarks[0]
    assert all(word.distance > 0 for word in found.words)


@pytest.mark.slow
def test_formats(tmp_path, backbone, capsys):
    path = checkpoint(tmp_path, {"ctx": moved(context_from_words(backbone, "a photo"))})
    command = ["interpret", str(path), "--backbone", "random-tiny", "--topk", "2"]
    assert main(command) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[0] == f"{path} (epoch 2): words of random-tiny"
    assert text[1].startswith("1: a</w> 0.0160  ") and text[2].startswith("2: photo</w> 0.0160  ")
    assert main([*command, "--format", "json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["shape"] == [2, 64] and [w["word"] for w in facts["words"] if w["rank"] == 1] == ["a", "photo"]
    assert main([*command, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["piece"] for row in rows if row["rank"] == "1"] == ["a</w>", "photo</w>"]
    assert float(rows[0]["distance"]) == facts["words"][0]["distance"]


@pytest.mark.slow
def test_what_cannot_be_read_is_one_sentence(tmp_path, backbone):
    path = checkpoint(tmp_path, {"ctx": torch.zeros(2, 64)})
    with pytest.raises(GramError, match="expected a results.json or log.txt .* name it with --backbone"):
        interpret(path)
    with pytest.raises(GramError, match="tokens of width 64, but gram-small has .* width 128"):
        interpret(path, backbone="gram-small")
    with pytest.raises(GramError, match="--topk is 0"):
        interpret(path, topk=0)
    with pytest.raises(GramError, match="expected a learned context .ctx .* found weight"):
        interpret(checkpoint(tmp_path / "other", {"weight": torch.zeros(2)}), backbone="random-tiny")
    (tmp_path / "empty").mkdir()
    with pytest.raises(GramError, match="empty: expected prompt_learner/ in it, found nothing"):
        interpret(tmp_path / "empty")
    with pytest.raises(GramError, match="found no such folder"):
        interpret(tmp_path / "nowhere")


SCRIPT = """
import os, runpy, sys
checkout, weights, *sys.argv = sys.argv[1:]
sys.path.insert(0, checkout)
import torch, clip.clip
clip.clip._download = lambda url, root=None: weights  # interpret_prompt.py would fetch RN50
load = torch.load
torch.load = lambda *args, **more: load(*args, **{"weights_only": False, **more})  # as torch had it then
runpy.run_path(os.path.join(checkout, sys.argv[0]), run_name="__main__")
"""


@pytest.mark.parametrize("words", ["a photo of a", ""])
def test_coops_interpret_prompt_prints_the_same(tmp_path, backbone, words):
    checkout = os.path.join(os.environ.get("GRAM_CHECKOUTS") or "", "CoOp")
    if not os.path.isfile(os.path.join(checkout, "interpret_prompt.py")):
        pytest.skip("GRAM_CHECKOUTS names no folder with CoOp/interpret_prompt.py")
    weights = {key: value.half().float() for key, value in backbone.model.state_dict().items()}
    torch.save(weights, tmp_path / "clip.pt")
    torch.manual_seed(1)
    context = moved(context_from_words(backbone, words), 4) if words else torch.randn(5, 64) * 0.02
    path = checkpoint(tmp_path, {"ctx": context})
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            SCRIPT,
            checkout,
            tmp_path / "clip.pt",
            "interpret_prompt.py",
            path,
            "7",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=checkout,
    )
    theirs = [line for line in done.stdout.splitlines() if line.partition(":")[0].isdigit()]
    found = interpret(path, topk=7, backbone=str(tmp_path / "clip.pt"))
    assert len(theirs) == len(context)
    for number, line in enumerate(theirs, 1):
        mine = [word for word in found.words if word.token == number]
        assert line == f"{number}: {[w.piece for w in mine]} {[f'{w.distance:.4f}' for w in mine]}"
