"""log.txt: the lines that programs of CoOp's checkout read, and all lines of a run with their numbers masked."""

import re

import pytest

pytestmark = pytest.mark.slow

NUMBER = r"[\d.]+"
AVERAGED = rf"{NUMBER} \({NUMBER}\)"

# Written out here, not in a golden file: parse_test_res.py of CoOp and its descendants (and people's own scripts after
# it) look for these, so no rewording may change them.
LINES = {
    "the end signal of parse_test_res.py, as a whole line": r"Finish training",
    "the end signal of parse_test_res.py --test-log, as a whole line": r"=> result",
    "the metric that parse_test_res.py reads": r"\* accuracy: \d+\.\d%",
    "total": r"\* total: [\d,]+",
    "correct": r"\* correct: [\d,]+",
    "error": r"\* error: \d+\.\d%",
    "macro_f1": r"\* macro_f1: \d+\.\d%",
    "split": r"Evaluate on the \*test\* set",
    "a step": rf"epoch \[\d+/\d+\] batch \[\d+/\d+\] time {AVERAGED} data {AVERAGED} loss {AVERAGED} acc {AVERAGED} "
    r"lr \d\.\d{4}e-\d\d eta \d+:\d\d:\d\d",
    "a checkpoint": r"Checkpoint saved to \S+/prompt_learner/model\.pth\.tar-2",
    "time": r"Elapsed: \d+:\d\d:\d\d",
    "begin of the arguments": r"\*\* Arguments \*\*",
    "begin of the config": r"\*\* Config \*\*",
    "an argument": r"seed: 1",
    "trainer": r"Loading trainer: \w+",
}
PER_CLASS = {
    "per class": r"=> per-class result",
    "a class": r"\* class: 0 \(red\)\ttotal: \d+\tcorrect: \d+\tacc: \d+\.\d%",
    "average": r"\* average: \d+\.\d%",
    "validation": r"Evaluate on the \*val\* set",
    "best": r"Checkpoint saved to \S+/prompt_learner/model-best\.pth\.tar",
}
LOADED = r'Loading weights to prompt_learner from "\S+/prompt_learner/model\.pth\.tar-2" \(epoch = 2\)'


def lines_of(made, run: str) -> list[str]:
    return (made.root / "runs" / run / "log.txt").read_text(encoding="utf-8").splitlines()


def has(lines: list[str], pattern: str) -> bool:
    return any(re.fullmatch(pattern, line) for line in lines)


@pytest.mark.parametrize(
    "run", ["CoOp", "CoCoOp", "VPT", "JointPrompt", "CoOpGRAM", "CoCoOpGRAM", "VPTGRAM", "UniGRAM"]
)
def test_lines_that_other_programs_read(run, made):
    lines = lines_of(made, run)
    assert [what for what, pattern in LINES.items() if not has(lines, pattern)] == []
    signal = lines.index("Finish training")
    accuracies = [i for i, line in enumerate(lines) if "* accuracy:" in line]
    assert accuracies[-1] > signal  # parse_test_res.py takes the last one after the signal
    assert sum(line.startswith("epoch [") for line in lines) == 4


def test_lines_per_class_and_of_validation(made):
    assert [what for what, pattern in PER_CLASS.items() if not has(lines_of(made, "CoOpGRAM"), pattern)] == []


def test_lines_of_an_evaluation(made):
    lines = lines_of(made, "CoOp_new")
    assert has(lines, LOADED) and "=> result" in lines and "Finish training" not in lines


@pytest.mark.parametrize("run", ["CoOp", "CoOpGRAM", "UniGRAM", "CoOp_new", "ZeroshotCLIP"])
def test_all_lines(run, made, golden):
    """What a run prints, but the options and the environment; numbers, times and folders are masked."""
    text = "\n".join(lines_of(made, run)).replace(str(made.root), "ROOT")
    before, _, rest = text.partition("** Config **")
    _, _, after = rest.partition("** System info **")
    environment, _, after = after.partition("\n\n")
    masked = re.sub(r"SHA-256 [0-9a-f]+", "SHA-256 N", before + "...\n" + after)
    masked = re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "N", masked)
    golden.text(f"log_{run}.txt", masked + "\n")
