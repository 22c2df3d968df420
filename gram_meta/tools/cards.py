"""GPUs that are not here: their memory, and their speed by published peaks and the efficiency measured on an H200."""

import re
from dataclasses import dataclass

from gram_meta.errors import GramError

# Memory in GB; published dense peaks in TFLOP/s: fp32 outside tensor cores, tf32 (0: neither tf32 nor bf16), 16 bits
CARDS = {
    "H100": (80, 67.0, 495.0, 990.0),
    "H200": (141, 67.0, 495.0, 990.0),
    "A100": (80, 19.5, 156.0, 312.0),
    "L40S": (48, 91.6, 183.0, 362.0),
    "RTX 4090": (24, 82.6, 82.6, 165.0),
    "RTX 3090": (24, 35.6, 35.6, 71.0),
    "V100": (32, 15.7, 0.0, 125.0),
    "T4": (16, 8.1, 0.0, 65.0),
}
# On an H200, a visual meta-step of ViT-B/16 took 771 ms in fp32 and 177 ms in bf16
# (docs/benchmarks/gpu_h200_meta_visual.json): 4 tasks x 5 classes x (4 passes x 4 support images + 2 passes x 12 query
# images) = 800 passes of 32.70 GFLOP (the last layer runs for the class token alone).
STEP_TFLOP = 800 * 32.70e-3
FP32_EFFICIENCY = STEP_TFLOP / 0.771 / 67  # 0.51 of the peak
HALF_EFFICIENCY = STEP_TFLOP / 0.177 / 990  # 0.15; also for tf32, which was not timed
# Seconds that a step takes at least (docs/results/benchmarks.md)
META_STEP = {"fp32": 0.012, "tf32": 0.012, "fp16": 0.008, "bf16": 0.008}  # of text prompts, on the H200
FEW_SHOT_STEP, COCOOP_STEP = 0.007, 0.004  # 32 images, 1 image; on an H100


@dataclass(frozen=True)
class Card:
    """A GPU in one precision."""

    name: str
    memory: float  # GB
    speed: float  # FLOP/s of the towers
    fp32_speed: float  # FLOP/s of Sentence-BERT
    least_step: float  # seconds of a meta-step


def find_card(name: str, precision: str) -> Card:
    """Return a card of `CARDS`, in no precision slower than in fp32; case, spaces, `-` and "nvidia" do not count.

    Raises:
        GramError: a card that is not in the table, or a precision that it does not have.
    """
    plain = re.sub(r"[\s-]", "", name.lower()).removeprefix("nvidia")
    known = next((known for known in CARDS if known.lower().replace(" ", "") == plain), None)
    if known is None:
        raise GramError(f"--card: expected one of {', '.join(CARDS)}, found {name!r}")
    memory, fp32, tf32, half = CARDS[known]
    peaks = {"fp32": fp32, "fp16": half} | ({"tf32": tf32, "bf16": half} if tf32 else {})
    if precision not in peaks:
        raise GramError(f"--precision: expected one of the {known}'s, {', '.join(peaks)}, found {precision!r}")
    slow = FP32_EFFICIENCY * fp32
    speed = max(HALF_EFFICIENCY * peaks[precision], slow)
    return Card(known, memory, 1e12 * speed, 1e12 * slow, META_STEP[precision])
