"""What tests of trainers need: CoOp's flags, and meta-checkpoints."""

from gram_meta.method.checkpoint import MetaCheckpoint
from gram_meta.method.prompts import initial_meta_net, initial_prompts
from gram_meta.method.regulator import GradientRegulator


def train_flags(data, out, trainer, *options, config="", seed=1):
    """Return CoOp's flags of a run on EmojiFood; `options` are KEY VALUE pairs."""
    flags = ("--root", data, "--seed", seed, "--trainer", trainer, "--dataset-config-file", "emoji_food")
    flags += ("--config-file", config) if config else ()
    return [*map(str, (*flags, "--output-dir", out, *options))]


def meta_of(backbone, text=4, visual=0, words="", conditional=False, seed=7, config=None):
    """Return a meta-checkpoint with initial prompts and the regulator's start, and with a meta-net if `conditional`."""
    prompts = initial_prompts(backbone, text, visual, words, seed=seed)
    regulator = GradientRegulator({kind: prompt.shape[1] for kind, prompt in prompts.items()})
    net = initial_meta_net(backbone, seed=seed) if conditional else {}
    extras = {f"meta_net.{name}": value for name, value in net.items()}
    return MetaCheckpoint(prompts, regulator, backbone.name, backbone.fingerprint, config or {}, extras=extras)
