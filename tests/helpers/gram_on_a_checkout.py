"""A checkout's trainer and the same with GRAM in one process, in the checkout's folder; test_checkouts.py runs it.

The arguments are those of the checkout's train.py, for the trainer with GRAM. The last line is JSON.
"""

import contextlib
import json
import os
import sys

sys.path.pop(0)  # the folder of this file; the checkout's takes its place
sys.path.insert(0, os.getcwd())

import gram_meta.plugin  # noqa: F401, before the checkout's imports

# isort: split
import torch
from dassl.engine import build_trainer
from dassl.utils import set_random_seed

import train  # the checkout's
from gram_meta.backbone.clip import load_backbone
from gram_meta.coop.launch import build_parser
from gram_meta.errors import GramError
from gram_meta.method.checkpoint import MetaCheckpoint, save_meta_checkpoint
from gram_meta.method.prompts import CoupledCLIP, PromptedCLIP
from gram_meta.method.regulator import GradientRegulator

with contextlib.suppress(ImportError):  # PromptSRC's 60 texts for each class take most of its time
    from trainers.imagenet_templates import IMAGENET_TEMPLATES

    del IMAGENET_TEMPLATES[3:]

OFF = ("TRAINER.GRAM.REGULATE", "False", "TRAINER.GRAM.INIT", "False")


def build(trainer, *opts):
    args = build_parser().parse_args([*sys.argv[1:], "TEST.NO_TEST", "True", *opts])
    args.trainer = trainer
    cfg = train.setup_cfg(args)
    set_random_seed(1)
    built = build_trainer(cfg)
    built.losses, step = [], built.forward_backward

    def watched(batch):
        result = step(batch)
        built.losses.append(result["loss"])
        return result

    built.forward_backward, built.save_model = watched, lambda *args, **kwargs: None
    return built


def stacked(values):
    return {name: v if isinstance(v, torch.Tensor) else torch.stack(list(v)).detach() for name, v in values.items()}


def trained(trainer, *opts):
    built = build(trainer, *opts)
    built.train()
    return built, built.test()


def save_theta(trainer, path, shallow=False):
    """Write a meta-checkpoint of random numbers for the trainer's parameters; `shallow`: of another shape."""
    torch.manual_seed(2)
    theta, extras = ({n: 0.05 * torch.randn_like(v) for n, v in stacked(values).items()} for values in learned(trainer))
    regulator = GradientRegulator({kind: value.shape[-1] for kind, value in theta.items()})
    if shallow:
        theta["text"] = theta["text"][0] if theta["text"].dim() == 3 and not extras else theta["text"][1:]
    save_meta_checkpoint(path, MetaCheckpoint(theta, regulator, "ViT-B/16", "0" * 64, extras=extras))
    return {**theta, **extras}


def learned(trainer):
    return trainer.gram_prompts(), trainer.gram_extras()


def logits(trainer):
    """The checkout's logits and this project's, of the same parameters."""
    prompts, extras = map(stacked, learned(trainer))
    names, images = trainer.dm.dataset.classnames, next(iter(trainer.test_loader))["img"]
    backbone = load_backbone("ViT-B/16")
    if extras:  # MaPLe learns the first 2 of the words "a photo of a"
        ours = CoupledCLIP(backbone, [f"of a {name}" for name in names], prompts, extras)
    else:
        ours = PromptedCLIP(backbone, names, prompts)
    trainer.set_model_mode("eval")
    with torch.no_grad():
        return trainer.model_inference(images), ours(images)


name = build_parser().parse_args(sys.argv[1:]).trainer
own, accuracy = trained(name.removesuffix("GRAM"))
gram, accuracy_with_gram = trained(name, *OFF)
pairs = zip(own.model.state_dict().items(), gram.model.state_dict().items(), strict=True)
theta = save_theta(gram, "meta.safetensors")
meta = build(name, "TRAINER.GRAM.CHECKPOINT", "meta.safetensors")
start = {n: value for values in learned(meta) for n, value in stacked(values).items()}
found = {
    "shapes": {n: list(value.shape) for n, value in start.items()},
    "losses": own.losses,
    "equal losses": own.losses == gram.losses,
    "equal parameters": all(a == b and v.equal(w) for (a, v), (b, w) in pairs),
    "accuracy": [accuracy, accuracy_with_gram],
    "theta*": max(float((start[n] - value).abs().max()) for n, value in theta.items()),
}
if name != "KgCoOpGRAM":
    there, here = logits(meta)
    found["logits apart"] = float((there - here).abs().max() / there.abs().max())
    found["logits spread"] = float(there.std())
meta.train()
found["ratios"] = {n: count["mean_ratio"] for n, count in meta.regulation.summary().items()}
found["raw"] = meta.raw_parameters
save_theta(gram, "other.safetensors", shallow=True)
try:
    build(name, "TRAINER.GRAM.CHECKPOINT", "other.safetensors")
except GramError as error:
    found["refused"] = str(error)
print(json.dumps(found))
