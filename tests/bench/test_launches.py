"""What a step asks of a GPU stays as little as it is: operations and waits of all trainers and families of prompts."""

import pytest
import torch

from gram_meta import engine

# With two layers: operations in fp32 and in fp16, waits a step. Three operations of a test batch (four in fp16, on a
# CPU) are for predictions.npz.
EXPECTED = {
    "ZeroshotCLIP, test batch": (43, 61, 0),
    "CoOp, step": (148, 192, 0.4),
    "CoOp, test batch": (43, 61, 0),
    "CoOpGRAM, step": (164, 208, 0.5),
    "CoOpGRAM, test batch": (43, 61, 0),
    "CoCoOp, step": (163, 207, 0.4),
    "CoCoOp, test batch": (91, 124, 0),
    "CoCoOpGRAM, step": (179, 223, 0.5),
    "CoCoOpGRAM, test batch": (91, 124, 0),
    "VPT, step": (108, 140, 0.4),
    "VPT, test batch": (44, 63, 0),
    "VPTGRAM, step": (124, 156, 0.5),
    "VPTGRAM, test batch": (44, 63, 0),
    "JointPrompt, step": (202, 261, 0.4),
    "JointPrompt, test batch": (44, 63, 0),
    "UniGRAM, step": (234, 293, 0.6),
    "UniGRAM, test batch": (44, 63, 0),
    "meta-step, text": (674, None, 0.2),
    "meta-step, conditional": (765, None, 0.2),
    "meta-step, visual": (713, None, 0.2),
    "meta-step, joint": (1308, None, 0.2),
    "meta-step, deep": (1367, None, 0.2),
    "meta-step, maple": (1381, None, 0.2),
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_no_step_takes_more_operations_or_waits_than_it_did(bench_script, precision):
    found = bench_script("launches").measure(precision, layers=2, official=False)
    expected = {name: (full, waits) for name, (full, _, waits) in EXPECTED.items()}
    if precision == "fp16":
        expected = {name: (half, waits) for name, (_, half, waits) in EXPECTED.items() if half}
    counts = {name: (row["operations"], row["waits"]) for name, row in found.items()}
    if engine.backend() == "real":  # its meters and its evaluator read every step
        counts = {name: (operations, expected[name][1]) for name, (operations, _) in counts.items()}
    assert list(counts) == list(expected)
    more = {
        name: pair for name, pair in counts.items() if any(a > b for a, b in zip(pair, expected[name], strict=True))
    }
    assert not more


def test_the_counter_sees_operations_casts_and_waits(bench_script):
    launches = bench_script("launches")
    x, towers = torch.tensor([1.0, -2.0, 3.0]), launches.narrow("fp32", 2)
    for step, operations, casts, waits in (
        (lambda: (x + x).view(3, 1).T[:, 1:], 1, 0, 0),
        (lambda: x.double().double(), 1, 1, 0),
        (lambda: (x.tolist(), x.cpu(), x.sum().item()), 2, 0, 3),
        (lambda: x[x > 0], 2, 0, 1),
        (lambda: torch.equal(x, x), 1, 0, 1),
        (lambda: bool((x > 0).all()), 3, 0, 1),
    ):
        row = launches.count(step, towers)
        assert (row["operations"], row["casts"], row["waits"]) == (operations, casts, waits)
