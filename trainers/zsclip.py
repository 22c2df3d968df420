"""ZeroshotCLIP: written class prompts, nothing learned."""

from collections.abc import Mapping

from torch import Tensor

from gram_meta.engine import register_trainer
from gram_meta.method.prompts import TEMPLATE, logits, template_features
from gram_meta.trainers.base import ClipTrainer

# The class prompts that CoOp's authors use; TEMPLATE for every other dataset
CUSTOM_TEMPLATES = {
    "OxfordPets": "a photo of a {}, a type of pet.",
    "OxfordFlowers": "a photo of a {}, a type of flower.",
    "FGVCAircraft": "a photo of a {}, a type of aircraft.",
    "DescribableTextures": "{} texture.",
    "EuroSAT": "a centered satellite photo of {}.",
    "Food101": "a photo of {}, a type of food.",
    "UCF101": "a photo of a person doing {}.",
}


@register_trainer
class ZeroshotCLIP(ClipTrainer):
    """CLIP as it is (Radford et al., 2021). Training it is a test."""

    def build_model(self) -> None:
        self.classnames = self.dm.dataset.classnames
        self.backbone = self.load_clip()
        self.encode_classes()
        self.max_epoch = 0  # nothing to learn

    def build_for_use(self, state_dict: Mapping[str, Tensor], where: str) -> None:
        self.encode_classes()

    def encode_classes(self) -> None:
        template = CUSTOM_TEMPLATES.get(self.cfg.DATASET.NAME, TEMPLATE)
        print(f'Class sentence: "{template}"')
        self.class_features = template_features(self.backbone, self.classnames, template)  # (N, D)

    def model_inference(self, images: Tensor) -> Tensor:
        return logits(self.backbone.encode_images(images), self.class_features, self.backbone.logit_scale)
