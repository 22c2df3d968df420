"""CoOp: context tokens before the class name, learned with cross-entropy (Zhou et al., 2022, arXiv 2109.01134)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gram_meta.backbone.clip import Backbone, end_positions
from gram_meta.engine import register_trainer
from gram_meta.errors import GramError
from gram_meta.method.prompts import ClassText, Parts, PromptedCLIP, PromptLearner, random_context
from gram_meta.trainers.base import PromptTrainer


@register_trainer
class CoOp(PromptTrainer):
    """Context Optimization. TRAINER.COOP.*: N_CTX, CTX_INIT, CSC, CLASS_TOKEN_POSITION, PREC."""

    family = ("CoOp", "CoOpGRAM")

    def check_cfg(self, cfg: Any) -> None:
        super().check_cfg(cfg)
        options = cfg.TRAINER.COOP
        if options.CSC and (cfg.TEST.PER_EPOCH or cfg.TEST.AT_STEPS):
            raise GramError("TRAINER.COOP.CSC: expected no TEST.PER_EPOCH or TEST.AT_STEPS, which need new classes")

    def reads(self) -> dict[str, Any]:
        return {"TRAINER.COOP.CLASS_TOKEN_POSITION": self.options.CLASS_TOKEN_POSITION}

    def tokens(self) -> dict[str, int]:
        return {"text": self.context_tokens(self.options.N_CTX)}

    def initial_prompts(self) -> dict[str, Tensor]:
        options = self.options
        if not options.CSC or options.CTX_INIT:
            if options.CSC:
                print("Note: TRAINER.COOP.CSC has no effect beside CTX_INIT, as in CoOp; it needs CTX_INIT ''")
            return {"text": self.initial_context(options.N_CTX)}  # (M, d)
        n, width = len(self.classnames), self.backbone.text_width
        print(f"Initial context: {options.N_CTX} random tokens per class")
        return {"text": random_context(width, n * options.N_CTX).view(n, options.N_CTX, width)}

    def build_classifier(self, classnames: list[str], prompts: Mapping[str, Tensor]) -> PromptedCLIP:
        context, position = prompts["text"], self.options.CLASS_TOKEN_POSITION
        if context.dim() == 2 and position == "end":
            return PromptedCLIP(self.backbone, classnames, prompts)
        model = PromptedCLIP(self.backbone, classnames, {"text": context.view(-1, *context.shape[-2:])[0]})
        model.prompt_learner = PromptLearner(prompts).to(self.backbone.device)
        model.class_text = PlacedText(self.backbone, classnames, context.shape[-2], position)
        return model


class PlacedText(ClassText):
    """Class prompts whose context stands before (end), around (middle) or behind (front) the class name.

    The context may be one for all classes, (M, d), or one per class, (N, M, d).
    """

    placed = True

    def __init__(self, backbone: Backbone, classnames: list[str], tokens: int, position: str) -> None:
        super().__init__(backbone, classnames, tokens)
        lengths = end_positions(backbone.tokenize([name.replace("_", " ") for name in classnames])) - 1  # (N,)
        total = 1 + tokens + self.ids.shape[1]
        before = {"end": tokens, "middle": tokens // 2, "front": 0}[position]
        order = torch.stack([_order(total, tokens, before, int(length)) for length in lengths])  # (N, total)
        self.order = order.to(backbone.device)

    def select(self, classes: Tensor, length: int | None = None) -> PlacedText:
        chosen = super().select(classes, length)
        assert isinstance(chosen, PlacedText)
        # what is cut off stands behind the longest end token, and nothing is moved there
        chosen.order = self.order[classes, : 1 + self.tokens + chosen.ids.shape[-1]]
        return chosen

    def _images(self, prompt: Tensor) -> int:
        return 1  # its leading axis are classes

    def _features(self, prompt: Tensor, deeper: Tensor | None = None) -> Tensor:
        """Return the class features (N, D); a context that is placed has no further layers."""
        own = self.own  # (N, L, d)
        n, _, width = own.shape
        context = prompt.to(own.dtype).expand(n, -1, -1)  # (N, M, d)
        sentence = torch.cat([self.start.expand(n, 1, -1), context, own], dim=1)  # (N, 1 + M + L, d)
        sentence = sentence.gather(1, self.order[..., None].expand(-1, -1, width))
        ends = self.ends + 1 + self.tokens
        return self.backbone.encode_text(sentence, ends, packing=self._packing(ends, sentence.shape[1], 0))

    def _prompts_of_parts(self, prompt: Tensor, parts: Parts) -> Sequence[Tensor]:
        if prompt.dim() == 2:
            return super()._prompts_of_parts(prompt, parts)
        return prompt.index_select(0, parts.order).split([len(text.ids) for text in parts.texts])


def _order(total: int, tokens: int, before: int, name: int) -> Tensor:
    """Return the source in [start, context, name, rest] of each place; `before` context tokens precede the name."""
    places = list(range(total))
    context, names = places[1 : 1 + tokens], places[1 + tokens : 1 + tokens + name]
    rest = places[1 + tokens + name :]
    return torch.tensor([0, *context[:before], *names, *context[before:], *rest])
