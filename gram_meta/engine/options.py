"""Options that CoOp's trainers and this project's add to Dassl's."""

from typing import Any

from yacs.config import CfgNode as CN

from gram_meta.config import RUN_BOUNDS, check_bounds, rename_old_keys
from gram_meta.processes import worker_count

OPTIONS: dict[str, dict[str, Any]] = {
    "TRAINER.COOP": {
        "N_CTX": 16,  # context tokens; ignored if CTX_INIT has words
        "CSC": False,  # a context per class
        "CTX_INIT": "",  # initial words
        "PREC": "fp16",  # of the frozen towers: fp16, fp32, amp or bf16; prompts are float32 in all of them
        "CLASS_TOKEN_POSITION": "end",  # end, middle or front
    },
    "TRAINER.COCOOP": {"N_CTX": 16, "CTX_INIT": "", "PREC": "fp16"},
    "TRAINER.VPT": {
        "N_CTX_VISION": 4,  # visual prompt tokens
        "VISUAL_INIT": "random",  # random, or class_token: copies of the image tower's class token
        "CTX_INIT": "a photo of a",  # words before the class name
        "PREC": "fp16",
        "PROMPT_DEPTH_VISION": 1,  # layers with prompts: only the first
    },
    "TRAINER.JOINT": {  # of JointPrompt and UniGRAM
        "N_CTX_TEXT": 2,
        "N_CTX_VISION": 2,
        "VISUAL_INIT": "random",
        "CTX_INIT": "a photo",  # N_CTX_TEXT initial tokens of the text prompt; "": random
        "PREC": "fp16",
    },
    "TRAINER.GRAM": {
        "CHECKPOINT": "",  # the meta-checkpoint (.safetensors) of `gram pretrain`
        "META": "",  # name of the meta config of this checkpoint; read by scripts, without effect in training
        "INIT": True,  # start from theta*; False: from CTX_INIT
        "REGULATE": True,  # pass every gradient through R^phi; False: raw gradients
        "STEP_SCALE": 1.0,  # factor of the raw gradient if REGULATE is off: a smaller step, as a control
    },
    "TRAINER.MEMORY": {  # activations kept for a backward pass, and computed twice; see docs/reference/defaults.md
        "CHECKPOINTING": "auto",  # auto: if more than the budgets below would be kept; always; never
        "CLASSES": 0,  # class prompts in one pass; 0: as many as TEXT_BUDGET allows
        "TEXT_BUDGET": 0.0,  # GB of the text tower; 0: a quarter of a GPU's memory, 1 on a CPU
        "IMAGE_BUDGET": 0.0,  # GB of the image tower, for visual prompts; 0: half of the device's memory
        "KEPT_IMAGES": 2.0,  # GB of decoded training images; if all take more, they are decoded in every epoch
        "CUDA_GRAPHS": True,  # on a GPU, record the towers' passes of a training step once, and replay them
    },
    "DATASET": {
        "SUBSAMPLE_CLASSES": "all",  # all, base or new
        "OUTSIDE_ROOT": False,  # True: split files may name images outside the dataset's folder (absolute paths and ..)
        "FOLDER": "",  # of the dataset ImageFolder: a folder of class folders under DATASET.ROOT
    },
    "DATALOADER": {
        "COOP_DECODING": False  # True: no EXIF turn, 16-bit grey clipped, transparency dropped, as in CoOp and Dassl
    },
    "TEST": {
        "PER_EPOCH": False,  # accuracy on base and on new classes before training and after every epoch
        "AT_STEPS": (),  # the same after these numbers of steps; 0: before training
    },
    "TRAIN": {
        "DETERMINISTIC": False  # equal numbers from equal seeds, but slower; see docs/guide/runs.md
    },
}


def extend_cfg(cfg: CN) -> None:
    """Add the options to a config tree; complete nodes that a checkout has added itself, and rename their old keys."""
    rename_old_keys(cfg)
    for path, defaults in OPTIONS.items():
        node = cfg
        for name in path.split("."):
            if name not in node:
                node[name] = CN()
            node = node[name]
        for key, value in defaults.items():
            if key not in node:
                node[key] = value


def complete_cfg(cfg: CN) -> None:
    """Add what is missing to a tree that may be frozen; raise `GramError` for a value out of its bounds.

    A train.py may have replaced a whole node (`TRAINER.VPT = CN()`).
    """
    frozen = cfg.is_frozen()
    cfg.defrost()
    extend_cfg(cfg)
    check_bounds(cfg, RUN_BOUNDS)
    cfg.DATALOADER.NUM_WORKERS = worker_count(cfg.DATALOADER.get("NUM_WORKERS", -1))
    if frozen:
        cfg.freeze()
