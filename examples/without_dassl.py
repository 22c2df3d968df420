"""GRAM without Dassl: a meta-checkpoint, a torch optimiser of your choice, and a folder of images for each class.

python examples/without_dassl.py output/meta/best.safetensors photos
"""

import sys

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from gram_meta.backbone.clip import load_backbone
from gram_meta.method.apply import Regulation
from gram_meta.method.checkpoint import load_meta_checkpoint
from gram_meta.method.prompts import PromptedCLIP


def main(checkpoint: str, folder: str, epochs: int = 10) -> Regulation:
    meta = load_meta_checkpoint(checkpoint)
    backbone = load_backbone(meta.backbone_name)
    meta.check(backbone, meta.tokens)  # the very CLIP that it was made with, and no meta-net
    data = ImageFolder(folder, backbone.preprocess())
    model = PromptedCLIP(backbone, data.classes, meta.prompts)  # starts from theta*
    prompts = model.prompt_learner.prompts()  # {"text": ...}, {"visual": ...} or both
    optimizer = torch.optim.AdamW(prompts.values(), lr=1e-3)
    regulation = Regulation(prompts, meta.regulator, gradient_norms=meta.gradient_norms)
    regulation.attach(optimizer)  # from here on, optimizer.step() sees R(g) instead of g
    for epoch in range(epochs):
        for images, labels in DataLoader(data, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    print(*regulation.lines(), sep="\n")
    return regulation


if __name__ == "__main__":
    main(*sys.argv[1:3])
