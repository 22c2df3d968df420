"""gram report --html: one run on the page, from results.json and predictions.npz; and what its script does."""

import base64
import hashlib
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from helpers.html import Page
from PIL import Image

from gram_meta.cli import main
from gram_meta.report import read_runs
from gram_meta.report.html import page as module

NASTY = '</td><script>alert(1)</script><img src="https://example.org/x.png" onerror="alert(1)">'
NAMES = ["cat", "dog", NASTY]
TRUE, SAID = [0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 0, 2, 0]
CONFIDENCE = [0.9, 0.8, 0.99, 0.4, 0.7, 0.6, 0.5, 0.7]
STEPS = {"step": [10, 20, 30], "gradient_norm": [1.0, 2.0, 3.0], "ratio": [0.9, None, 0.7]}
CURVE = [{"step": 0, "epoch": 0.0, "base": 50.0, "new": 40.0}, {"step": 9, "epoch": 1.0, "base": 62.5}]


def write(folder, root, names=NAMES, trainer="CoOp", seed=1, subsample="base", **more):
    """Write results.json of a run whose dataset is below `root`."""
    result = {
        "format": 1,
        "trainer": trainer,
        "dataset": "Pets",
        "subsample": subsample,
        "shots": 16,
        "seed": seed,
        "backbone": "gram-small",
        "split": "test",
        "eval_only": False,
        "model_dir": "",
        "epoch": 10,
        "classnames": names,
        "metrics": {"accuracy": 50.0, "error_rate": 50.0, "macro_f1": 45.0, "total": 8, "correct": 4},
        "config": {"DATASET": {"ROOT": str(root), "NAME": "Pets"}},
        **more,
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(result))
    return folder


def write_predictions(folder, images, true=TRUE, said=SAID, confidence=CONFIDENCE):
    columns = {"image": images, "label": true, "prediction": said, "confidence": np.array(confidence, np.float32)}
    np.savez_compressed(folder / "predictions.npz", **columns)


@pytest.fixture
def tree(tmp_path):
    """A regulated run with everything, its test on new classes, and a run of an earlier version."""
    root = tmp_path / "data"
    (root / "pets").mkdir(parents=True)
    images = [f"pets/{i}.png" for i in range(8)]
    for i in (2, 3, 7):  # the others are gone
        Image.fromarray(np.full((40, 30, 3), 30 * i, np.uint8)).save(root / images[i])
    did = {"steps": 30, "gamma_mean": 0.9, "over_steps": STEPS | {"gamma": [0.9, 0.8, 0.75], "beta": [None, 0.5, 0.25]}}
    one = write(tmp_path / "runs/one", root, trainer="CoOpGRAM", curve=CURVE, regulator={"text": did})
    write_predictions(one, images)
    write(tmp_path / "runs/two", root, trainer="CoOpGRAM", subsample="new", model_dir=str(one), eval_only=True)
    write(tmp_path / "runs/old", root, trainer="VPTGRAM", regulator={"visual": {"steps": 5, "gamma_mean": 1.0}})
    return tmp_path / "runs"


def html_of(tree, out):
    assert main(["report", str(tree), "--html", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_predictions_by_hand(tree, monkeypatch):
    by_folder = {run.path.parent.name: run for run in read_runs([tree])}
    monkeypatch.setattr(module, "WRONG", 3)
    confusion, wrong = module.read_predictions(by_folder["one"])
    assert confusion.tolist() == [[2, 2, 0], [1, 1, 0], [1, 0, 1]]
    assert [(it["image"], it["label"], it["prediction"]) for it in wrong] == [
        ("pets/2.png", 0, 1),
        ("pets/7.png", 2, 0),
        ("pets/5.png", 1, 0),
    ]  # of four
    assert module.read_predictions(by_folder["old"]) is None


@pytest.mark.parametrize("damage", ["cut", "other classes", "no column"])
def test_damaged_predictions_are_one_sentence(tree, damage, tmp_path, capsys):
    path = tree / "one/predictions.npz"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "other classes":
        write_predictions(tree / "one", ["x"], [3], [0], [0.5])
    else:
        np.savez(path, image=["x"])
    assert main(["report", str(tree), "--html", str(tmp_path / "page.html")]) == 2
    assert f"{path}: expected predictions of 3 classes, found another file (" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_run_on_the_page(tree, tmp_path):
    text = html_of(tree, tmp_path / "page.html")
    found = Page(text)
    run = text[text.index('<details class="run" id="run-0"') : text.index('<details class="run" id="run-1"')]
    assert '<th scope="row">cat</th><td>4</td><td>2</td><td>50.0</td><td class="words">dog 2</td>' in run
    assert '<td>2</td><td>1</td><td>50.0</td><td class="words">cat 1</td>' in run
    cells = re.findall(r'<td(?: class="right")? style="--s:(\d+)%">(\d)</td>', run)
    assert cells == [("50", "2"), ("50", "2"), ("50", "1"), ("50", "1"), ("50", "1"), ("50", "1")]
    alts = [a["alt"] for a in found.all("img") if a["src"].startswith("data:image/") and "confidence" in a["alt"]]
    assert alts == [
        "cat, taken for dog with confidence 99 %",
        f"{NASTY}, taken for cat with confidence 70 %",
        "cat, taken for dog with confidence 40 %",
    ]
    assert "dog, taken for cat with confidence 60 %" in [a.get("aria-label") for a in found.all("span", role="img")]
    labels = [a["aria-label"] for a in found.all("svg", role="img")]
    assert "Test accuracy (%) from steps 0 to 9: base classes 50 to 62.5; new classes 40 to 40" in labels
    assert "\u03b3, root mean square from steps 10 to 30: \u03b3, root mean square 0.9 to 0.75" in labels
    assert [label.partition(" from")[0] for label in labels[1:]] == [
        *("\u03b3, root mean square", "|\u03b2|", "|R(g)| / |g|", "|g|")
    ]
    assert run.count("h0") >= 1 and "nan" not in run.lower().replace("nano", "")
    new = text[text.index('<details class="run" id="run-1"') : text.index('<details class="run" id="run-2"')]
    assert '<a href="#run-0">its training</a>' in new and "in <code>predictions.npz</code>" in new
    assert "Over steps: not recorded, as the run is of an earlier version." in text[text.index('id="run-2"') :]


def test_nothing_is_taken_for_markup_and_only_the_pages_script_may_run(tree, tmp_path):
    text = html_of(tree, tmp_path / "page.html")
    found = Page(text)
    assert len(found.all("script")) == 1 and not found.all("img", src="https://example.org/x.png")
    script = text[text.index("<script>") + 8 : text.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = found.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert f"script-src 'sha256-{digest}'" in policy["content"] and "default-src 'none'" in policy["content"]
    assert all(link.startswith("#") and link[1:] in found.values("id") for link in found.values("href"))
    assert len(found.values("id")) == len(set(found.values("id")))
    labelled = set(found.values("for"))
    assert all(a["id"] in labelled for tag in ("input", "select") for a in found.all(tag))
    assert all("scope" in a for a in found.all("th"))


@pytest.mark.slow
def test_many_runs_with_many_classes_stay_below_10_mb(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    noise = np.random.default_rng(0)
    for i in range(40):
        pixels = noise.integers(0, 256, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{i}.png")
    names = [f"a class with a rather long name, number {k}" for k in range(1000)]
    images, true = [f"{i % 40}.png" for i in range(5000)], np.arange(5000) % 1000
    for seed in range(60):
        folder = write(tmp_path / f"runs/{seed}", tmp_path / "data", names, seed=seed)
        said = np.where(noise.random(5000) < 0.5, true, noise.integers(0, 1000, 5000))
        write_predictions(folder, images, true, said, noise.random(5000))
    text = html_of(tmp_path / "runs", tmp_path / "page.html")
    assert len(text.encode()) < 10_000_000
    assert "The 200 lowest of 1000." in text and "those with the highest confidence" in text
    monkeypatch.setattr(module, "DETAILED", 7)
    text = html_of(tmp_path / "runs", tmp_path / "page.html")
    assert "The first 7 of 60 runs" in text and text.count('<details class="run"') == 7


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


USE = """
var runs = document.querySelector("#runs"), search = runs.querySelector("input");
var heading = runs.querySelectorAll("th")[5];
search.value = "vptgram old"; search.dispatchEvent(new Event("input"));
heading.querySelector("button").click(); heading.querySelector("button").click();
var words = document.querySelector("#which-words");
words.value = "new coopgram"; words.dispatchEvent(new Event("input"));
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("used", [False, True])
def test_in_a_browser(tree, tmp_path, used):
    """A link opens its run; used: searching and sorting the table of runs, and searching the list of runs."""
    for seed in range(2, 6):
        write(tree / f"more{seed}", tmp_path / "data", seed=seed)
    text = html_of(tree, tmp_path / "page.html")
    if used:  # a script of the test may run without the page's policy only
        (policy,) = re.findall("<meta http-equiv=.*>", text)
        text = text.replace(policy, "").replace("</body>", f"<script>{USE}</script></body>")
        (tmp_path / "page.html").write_text(text, encoding="utf-8")
    argv = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--timeout=20000"]
    argv += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "page.html").as_uri() + "#run-1"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    if not done.stdout.strip():
        pytest.skip(f"chromium does not start here: {done.stderr.strip()[-200:]}")
    shown = Page(done.stdout)
    runs = {run["id"]: ("open" in run, "hidden" in run) for run in shown.all("details", **{"class": "run"})}
    opened = [name for name, state in runs.items() if state == (True, False)]
    assert set(runs.values()) == {(True, False), (False, True)}
    assert "hidden" not in shown.all("form", **{"class": "find choose"})[0]
    if not used:
        assert opened == ["run-1"]
        return
    labels = [run.label + run.subsample for run in sorted_runs(tree)]
    assert opened == [f"run-{labels.index('CoOpGRAMnew')}"] and "1 of 7 runs" in shown.text
    table = done.stdout[done.stdout.index('<section id="runs"') : done.stdout.index('<section id="configs"')]
    rows = re.findall(
        r"<tr( hidden=\"\")?>\s*<th scope=\"row\"><a[^>]*>(\w+)</a>.*?<td>(\d+)</td><td>10</td>", table, re.S
    )
    assert [(trainer, seed) for hidden, trainer, seed in rows if not hidden] == [("VPTGRAM", "1")]
    assert [int(seed) for _, _, seed in rows] == [5, 4, 3, 2, 1, 1, 1]
    assert "1 of 7 rows" in shown.text and table.count('aria-sort="descending"') == 1


def sorted_runs(tree):
    return sorted(read_runs([tree]), key=lambda run: (run.label, run.dataset, run.subsample, run.seed))
