"""CoCoOp: a context that a small network shifts for each image (Zhou et al., CVPR 2022, arXiv 2203.05557)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gram_meta.engine import register_trainer
from gram_meta.errors import GramError
from gram_meta.method.prompts import META_NET, SENTENCES, ConditionalCLIP, MetaNet
from gram_meta.random_state import kept_random_state
from gram_meta.trainers.base import PromptTrainer


@register_trainer
class CoCoOp(PromptTrainer):
    """Conditional Context Optimization. TRAINER.COCOOP.*: N_CTX, CTX_INIT, PREC. The paper trains with batches of 1."""

    node = "COCOOP"
    family = ("CoCoOp", "CoCoOpGRAM")

    def tokens(self) -> dict[str, int]:
        return {"text": self.context_tokens(self.options.N_CTX)}

    def initial_prompts(self) -> dict[str, Tensor]:
        context = self.initial_context(self.options.N_CTX)
        backbone = self.backbone
        self.net = MetaNet(backbone.embed_dim, backbone.embed_dim // 16, backbone.text_width).state_dict()
        return {"text": context}

    def build_for_use(self, state_dict: Mapping[str, Tensor], where: str) -> None:
        net = (name for name in state_dict if name.startswith(META_NET))
        self.net = {name.removeprefix(META_NET): state_dict[name] for name in net}
        if not self.net:
            raise GramError(f"{where}: expected a meta-net beside the prompt, found {', '.join(state_dict)}")
        super().build_for_use(state_dict, where)

    def build_classifier(self, classnames: list[str], prompts: Mapping[str, Tensor]) -> ConditionalCLIP:
        with kept_random_state():  # the meta-net is drawn once, above
            return ConditionalCLIP(self.backbone, classnames, prompts, self.net)

    def scores(self, model: Any, features: Tensor) -> Tensor:
        at_a_time = max(1, SENTENCES // len(model.class_text.ends))  # images, as their class features are many
        return torch.cat([model.image_logits(some) for some in features.split(at_a_time)])
