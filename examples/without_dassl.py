"""GRAM without Dassl: a meta-checkpoint, a torch optimiser of your choice, and a folder of images for each class.

python examples/without_dassl.py output/meta/best.safetensors photos
"""

import sys

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import gram_meta as gram


def main(checkpoint: str, folder: str, epochs: int = 10) -> gram.Regulation:
    """Train the prompts of the meta-checkpoint on the images; return what the regulator did."""
    meta = gram.load(checkpoint)
    backbone = gram.load_backbone(meta.backbone_name)
    meta.check(backbone, meta.tokens)  # the very CLIP of meta-training, and no meta-net
    data = ImageFolder(folder, backbone.preprocess())
    model = gram.PromptedCLIP(backbone, data.classes, meta.prompts)  # starts from theta*
    optimizer = torch.optim.AdamW(model.parameters_to_learn(), lr=1e-3)
    regulation = gram.regulate(optimizer, model.prompts(), meta)  # optimizer.step() now sees R(g) instead of g
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
