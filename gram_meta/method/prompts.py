"""Text and visual prompts around frozen CLIP towers (Eq. 1, 2; Sec. 3.1).

A prompt is a float32 tensor of tokens: `"text"` (M_t, d_text), `"visual"` (M_v, d_visual). It is cast to the towers'
number type only at their input: an fp16 prompt would lose small steps. A deep prompt has an axis of layers in front,
(layers, M, d): its first layer joins the tower's input, and each further one replaces the tokens of that prompt at the
input of a layer. In the family `maple` the visual tokens are affine functions of the text tokens, one for each layer
(`coupled`; MaPLe: Khattak et al., CVPR 2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from gram_meta.backbone.clip import Backbone, end_positions, load_backbone, tokenize
from gram_meta.backbone.graphs import Recorded
from gram_meta.backbone.recompute import recomputed
from gram_meta.backbone.towers import Packing, Rectangle
from gram_meta.errors import GramError

STATE_NAMES = {"text": "ctx", "visual": "visual_ctx"}  # kind of prompt -> its name in a prompt learner's state dict
KINDS = tuple(STATE_NAMES)
META_NET = "meta_net."  # prefix of the names of the meta-net's weights beside prompts
COUPLING = ("coupling.weight", "coupling.bias")  # names of the coupling functions' parameters beside prompts
TEMPLATE = "a photo of a {}."

# Class prompts in one pass of the text tower without gradients: 1,024 need a third of the memory of 4,096, and take
# 15 to 25 % less time on a CPU.
SENTENCES = 1024


@dataclass(frozen=True)
class PromptConfig:
    """The prompts to meta-train; `GramError` for no prompt tokens at all, or for parts that do not go together."""

    text_tokens: int = 4  # M_t; 0: no text prompt
    visual_tokens: int = 0  # M_v; 0: no visual prompt
    words: str = "a photo of a"  # initialisation of the text prompt; "": random
    template: str = TEMPLATE  # class prompt if there is no text prompt
    conditional: bool = False  # whether a meta-net shifts the text prompt for each image, as in CoCoOp
    visual_start: str = "random"  # of visual tokens: `random`, or `class_token` (`class_token_start`)
    visual_size: float = 0.0  # root mean square that each visual token is held at (`hold_size`); 0: free
    family: str = "independent"  # `independent`, or `maple`: visual tokens are functions of the text tokens (`coupled`)
    text_depth: int = 1  # layers of the text tower with a prompt of their own
    visual_depth: int = 1  # the same of the image tower
    fixed_words: str = ""  # words between the text prompt and the class name; they are not learned

    def __post_init__(self) -> None:
        if not self.text_tokens and not self.visual_tokens:
            raise GramError("PROMPT: expected TEXT_TOKENS or VISUAL_TOKENS above 0, found neither")
        if self.conditional and not self.text_tokens:
            raise GramError("PROMPT.CONDITIONAL: expected a text prompt to shift, found TEXT_TOKENS 0")
        if self.conditional and (self.coupled or self.text_depth > 1):
            raise GramError("PROMPT.CONDITIONAL: expected FAMILY independent and TEXT_DEPTH 1, found others")
        sizes = (self.text_tokens, self.text_depth), (self.visual_tokens, self.visual_depth)
        if self.coupled and (sizes[0] != sizes[1] or self.visual_size or self.visual_start != "random"):
            raise GramError(
                "PROMPT.FAMILY maple: expected as many VISUAL_TOKENS as TEXT_TOKENS, VISUAL_DEPTH as TEXT_DEPTH, "
                f"VISUAL_SIZE 0 and VISUAL_START random, found {sizes[1][0]} and {sizes[0][0]}, {sizes[1][1]} and "
                f"{sizes[0][1]}, {self.visual_size:g}, {self.visual_start}"
            )

    @property
    def coupled(self) -> bool:
        """Whether visual tokens are functions of the text tokens."""
        return self.family == "maple"

    @classmethod
    def from_config(cls, config: CfgNode) -> PromptConfig:
        """Read the PROMPT node."""
        return cls(**{key.lower(): value for key, value in config.PROMPT.items()})

    def before_names(self, names: Sequence[str]) -> list[str]:
        """Put the fixed words before class names."""
        return [f"{self.fixed_words} {name}" if self.fixed_words else name for name in names]


class ClassText:
    """Class prompts with M open slots for a text prompt: start token, M slots, class name, full stop, end token.

    All are cut behind the longest one's end token: the text tower is causal, so logits and gradients stay
    the same. Start token and prompt are the same for all classes and are computed once.

    Attributes:
        ids: (N, L) token ids from the class name on; `ends` (N,) index of the end token in them. After `select` with
            indices (B, K): (B, K, L) and (B, K).
        start: (1, d) embedding of the start token.
        tokens: M.
        chunk: while the prompt is learned, number of class prompts whose activations are kept at a time; those of the
            others are recomputed in the backward pass. 0: all are kept. Tasks (`select` with (B, K)) are always
            encoded at once. Without gradients at most `SENTENCES` are encoded at a time.
        placed: whether the M slots are separate positions of each class prompt, not shared by all of them.
    """

    placed = False

    def __init__(self, backbone: Backbone, classnames: Sequence[str], tokens: int, suffix: str = ".") -> None:
        names = [name.replace("_", " ") for name in classnames]
        slots = " ".join(["X"] * tokens) + " " if tokens else ""
        ids = backbone.tokenize([f"{slots}{name}{suffix}" for name in names])  # (N, 77)
        ends = end_positions(ids)
        self.backbone = backbone
        self.tokens = tokens
        self.start = backbone.embed_tokens(ids[0, :1])
        self.ids = ids[:, 1 + tokens : int(ends.max()) + 1].to(backbone.device)
        self.ends = (ends - 1 - tokens).to(backbone.device)
        self.chunk = 0
        self._packings: dict[Any, Packing | Rectangle] = {}  # by the leading axes of the prompt
        self._parts: dict[int, Parts] = {}  # by their size

    @property
    def own(self) -> Tensor:
        """Embeddings (..., N, L, d) of `ids`; they are not kept, as those of 20,000 classes take half a gigabyte."""
        return self.backbone.embed_tokens(self.ids)

    def select(self, classes: Tensor, length: int | None = None) -> ClassText:
        """Return the sentences of some classes, (K,) or (B, K) for K classes in each task, cut at their longest.

        Args:
            length: tokens of the longest, if known; computing it makes a GPU wait.
        """
        chosen = copy(self)
        chosen.ends = self.ends[classes]
        chosen.ids = self.ids[classes, : length or int(chosen.ends.max()) + 1]
        chosen._packings, chosen._parts = {}, {}
        return chosen

    def features(self, prompt: Tensor, deeper: Tensor | None = None) -> Tensor:
        """Return the L2-normalised class features.

        Args:
            prompt: (M, d); or (..., M, d) with more axes: those of `own` first (a prompt per task), then any others (a
                prompt per image of each task).
            deeper: (..., layers - 1, M, d) the further layers of a deep prompt (`by_layer`), not one for each image.

        Returns:
            (N, D), or (..., N, D).
        """
        learns = torch.is_grad_enabled() and prompt.requires_grad
        most = self.chunk if learns else SENTENCES  # at a time
        images = self._images(prompt)
        if not most or images * len(self.ids) <= most or self.ids.dim() > 2:
            return self._features(prompt, deeper)
        if images == 1:
            return self._features_by_parts(prompt, min(most, len(self.ids)), deeper)
        each = prompt.flatten(0, -3).split(max(1, most // len(self.ids)))  # some images' prompts (b, M, d)
        done = [self._features_by_parts(some, min(most, len(self.ids))) for some in each]
        return torch.cat(done).unflatten(0, prompt.shape[:-2])

    def _images(self, prompt: Tensor) -> int:
        """Return how often each class is encoded: once for each image with a separate prompt."""
        return math.prod(prompt.shape[:-2])

    def _features(self, prompt: Tensor, deeper: Tensor | None = None) -> Tensor:
        """Return the features of all classes, computed in one pass."""
        lead = prompt.shape[:-2]
        start = self.start.expand(*lead, *self.start.shape)
        shared = torch.cat([start, prompt.to(start.dtype)], dim=-2)  # (..., 1 + M, d)
        tasks = self.ids.shape[:-2]
        between = (1,) * (len(lead) - len(tasks))
        own = self.own  # (tasks, N, L, d)
        own = own.view(*tasks, *between, *own.shape[-3:]).expand(*lead, -1, -1, -1)  # (..., N, L, d)
        ends = self.ends.view(*tasks, *between, -1).expand(*lead, -1)  # (..., N)
        packing = self._packing(ends, own.shape[-2], shared.shape[-2])
        return self.backbone.encode_text(own, ends, shared, packing, deeper)

    def _packing(self, ends: Tensor, length: int, before: int) -> Packing | Rectangle:
        """Return the packing; it is kept: it depends on the class prompts alone, and computing it makes a GPU wait."""
        key = ends.shape[:-1], before
        if key not in self._packings:
            if len(self._packings) >= 4:  # batches of other sizes
                self._packings.clear()
            self._packings[key] = self.backbone.packing(ends, length, before)
        return self._packings[key]

    def _features_by_parts(self, prompt: Tensor, size: int, deeper: Tensor | None = None) -> Tensor:
        parts, more = self._in_parts(size), () if deeper is None else (deeper,)
        prompts = self._prompts_of_parts(prompt, parts)
        done = [recomputed(text._features, own, *more) for text, own in zip(parts.texts, prompts, strict=True)]
        return torch.cat(done, dim=-2).index_select(-2, parts.back)

    def _in_parts(self, size: int) -> Parts:
        if size not in self._parts:
            order = self.ends.argsort(stable=True)
            texts = [self.select(some) for some in order.split(size)]
            self._parts = {size: Parts(texts, order, order.argsort())}
        return self._parts[size]

    def _prompts_of_parts(self, prompt: Tensor, parts: Parts) -> Sequence[Tensor]:
        return [prompt] * len(parts.texts)


class Parts(NamedTuple):
    """Class prompts in parts."""

    texts: list[ClassText]
    order: Tensor  # (N,) classes in the order of the parts
    back: Tensor  # (N,) place of each class in that order


def context_from_words(backbone: Backbone, words: str) -> Tensor:
    """Return the token embeddings (M, d_text), float32, of words such as "a photo of a"."""
    ids = backbone.tokenize([words.replace("_", " ")])
    return backbone.embed_tokens(ids[0, 1 : 1 + count_tokens(words)]).float()


def count_tokens(words: str) -> int:
    """Return the tokens M of words without a backbone; raise `GramError` for more than CLIP's 77 positions."""
    return int(end_positions(tokenize([words.replace("_", " ")]))[0]) - 1


def random_context(width: int, tokens: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw (tokens, width) float32 from N(0, 0.02), CoOp's initialisation without words."""
    return torch.empty(tokens, width).normal_(std=0.02, generator=generator)


def class_token_start(backbone: Backbone, tokens: int, generator: torch.Generator | None = None) -> Tensor:
    """Return (tokens, d_visual), float32: the class token as it enters the tower, with noise of a tenth of its size.

    Copies of a token that the tower knows change its features little; random tokens take attention from patches. The
    noise gives the tokens different gradients.
    """
    visual = backbone.model.visual
    token = (visual.class_embedding + visual.positional_embedding[0]).detach().float()  # (d,)
    drawn = random_context(len(token), tokens, generator).to(token.device)  # (tokens, d), of size 0.02
    return token + drawn * token.square().mean().sqrt() * (0.1 / 0.02)


def template_features(backbone: Backbone, classnames: Sequence[str], template: str = TEMPLATE) -> Tensor:
    """Return class features (N, D) of a written template, L2-normalised, without a gradient."""
    return backbone.encode_texts([template.format(name.replace("_", " ")) for name in classnames])


def initial_prompts(
    backbone: Backbone,
    text_tokens: int,
    visual_tokens: int,
    words: str = "",
    seed: int = 0,
    visual_start: str = "random",
) -> dict[str, Tensor]:
    """Return the initial prompts of meta-training or of a baseline.

    Args:
        text_tokens, visual_tokens: M_t and M_v; 0 leaves the kind out.
        words: text for the text prompt; it must have exactly `text_tokens` tokens. "" draws N(0, 0.02).
        seed: of the random draws.
        visual_start: "random" draws the visual prompt from N(0, 0.02), "class_token" see `class_token_start`.

    Raises:
        GramError: words of another number of tokens, or a visual prompt for a ResNet.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = {}
    if text_tokens and words:
        prompts["text"] = context_from_words(backbone, words)
        if len(prompts["text"]) != text_tokens:
            found = len(prompts["text"])
            raise GramError(f"words for the prompt: expected {text_tokens} tokens, found {found} in {words!r}")
    elif text_tokens:
        prompts["text"] = random_context(backbone.text_width, text_tokens, generator).to(backbone.device)
    if visual_tokens:
        if not backbone.is_vit:
            raise GramError(f"visual prompts: expected a ViT image tower of OpenAI's kind, found {backbone.name}")
        prompts["visual"] = initial_visual_prompt(backbone, visual_tokens, visual_start, generator).to(backbone.device)
    return prompts


def initial_visual_prompt(
    backbone: Backbone, tokens: int, start: str = "random", generator: torch.Generator | None = None
) -> Tensor:
    """Return the initial visual prompt (tokens, d_visual) of `start` "random" or "class_token"."""
    if start == "class_token":
        return class_token_start(backbone, tokens, generator)
    return random_context(backbone.visual_width, tokens, generator)


def deepened(backbone: Backbone, prompts: Mapping[str, Tensor], config: PromptConfig, seed: int) -> dict[str, Tensor]:
    """Give initial prompts (M, d) their further layers and coupling functions.

    As in MaPLe and PromptSRC, further layers are drawn from N(0, 0.02), and coupling functions as torch draws linear
    layers.

    Returns:
        Prompts (layers, M, d); (M, d) of an independent prompt of one layer. In the family `maple` `coupling.weight`
        (layers, d_visual, d_text) and `coupling.bias` (layers, d_visual) take the visual prompt's place.

    Raises:
        GramError: more layers than the tower has.
    """
    generator = torch.Generator().manual_seed(seed + 1)  # `initial_prompts` has drawn from that of `seed`
    model, theta = backbone.model, {}
    for kind, prompt in prompts.items():
        depth = config.text_depth if kind == "text" else config.visual_depth
        layers = len((model if kind == "text" else model.visual).transformer.resblocks)
        if depth > layers:
            raise GramError(f"PROMPT.{kind.upper()}_DEPTH: expected at most the tower's {layers} layers, found {depth}")
        further = torch.empty(depth - 1, *prompt.shape).normal_(std=0.02, generator=generator).to(prompt)
        theta[kind] = torch.cat([prompt[None], further]) if depth > 1 or config.coupled else prompt
    if config.coupled:
        layers, _, width = theta.pop("visual").shape
        bound = backbone.text_width**-0.5
        for name, shape in zip(COUPLING, ((layers, width, backbone.text_width), (layers, width)), strict=True):
            theta[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator).to(backbone.device)
    return theta


def by_layer(prompt: Tensor, axes: int = 2) -> tuple[Tensor, ...]:
    """Split a deep prompt into that of the first layer, (..., M, d), and those of the others, (..., layers - 1, M, d).

    A prompt of one layer gives the first alone. `axes` is the number of axes of a prompt that is not deep.
    """
    if prompt.dim() == axes:
        return (prompt,)
    first, deeper = prompt[..., 0, :, :], prompt[..., 1:, :, :]
    return (first, deeper) if deeper.shape[-3] else (first,)


def coupled(prompts: Mapping[str, Tensor]) -> Tensor | None:
    """Return the visual prompt: `"visual"` of `prompts`, or the text prompt after its coupling functions, or None.

    The coupling function of a layer is affine (MaPLe): (..., layers, M, d_text) -> (..., layers, M, d_visual).
    """
    if COUPLING[0] not in prompts:
        return prompts.get("visual")
    weight, bias = (prompts[name] for name in COUPLING)
    return prompts["text"] @ weight.transpose(-1, -2) + bias.unsqueeze(-2)


@torch.no_grad()
def hold_size(prompt: Tensor, size: float) -> None:
    """Scale each visual token of (M, d) or (layers, M, d), in place, to root mean square `size`.

    The first layer norm (`ln_pre`) takes the size out of every visual token, so features stay the same up to epsilon.
    So do the layer norms in front of attention, but for the last layer of a deep prompt, whose tokens live on.
    Gradients do not: they shrink as 1 / size, and a step turns the token by 1 / size^2. Meta-training lets a free token
    grow, because growth costs no loss; a few-shot run then hardly moves it at the usual learning rate.
    """
    prompt *= size / prompt.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)


def initial_meta_net(backbone: Backbone, seed: int = 0) -> dict[str, Tensor]:
    """Draw weights of CoCoOp's meta-net as torch draws linear layers: D -> D // 16 -> d_text, float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = MetaNet(backbone.embed_dim, backbone.embed_dim // 16, backbone.text_width)
    return {name: value.detach().to(backbone.device) for name, value in net.state_dict().items()}


def conditional_shift(net: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Return what CoCoOp adds to each context token for an image: a small network applied to the image's feature.

    Args:
        net: `linear1.weight` (..., D // 16, D), `linear1.bias`, `linear2.weight` (..., d, D // 16), `linear2.bias`;
            leading axes are tasks with separate weights.
        features: (..., n, D).

    Returns:
        (..., n, d_text).
    """

    def linear(x: Tensor, layer: str) -> Tensor:
        return x @ net[f"{layer}.weight"].transpose(-1, -2) + net[f"{layer}.bias"].unsqueeze(-2)

    return linear(torch.relu(linear(features, "linear1")), "linear2")


class MetaNet(nn.Module):
    """CoCoOp's meta-net (Zhou et al., CVPR 2022), with its parameters' names. features (n, D) -> shifts (n, d_text)."""

    def __init__(self, width: int, hidden: int, text_width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, text_width)

    def forward(self, features: Tensor) -> Tensor:
        return conditional_shift(dict(self.named_parameters()), features)


class PromptLearner(nn.Module):
    """The learned part: `ctx` (text, CoOp's name for it) and/or `visual_ctx`, float32."""

    def __init__(self, prompts: Mapping[str, Tensor]) -> None:
        super().__init__()
        if not prompts or set(prompts) - set(KINDS):
            raise GramError(f"prompts: expected the kinds {' and/or '.join(KINDS)}, found {sorted(prompts)}")
        self.ctx = _parameter(prompts.get("text"))
        self.visual_ctx = _parameter(prompts.get("visual"))

    def prompts(self) -> dict[str, nn.Parameter]:
        """Return the existing prompts by kind."""
        return {kind: p for kind, p in zip(KINDS, (self.ctx, self.visual_ctx), strict=True) if p is not None}


class PromptedCLIP(nn.Module):
    """A classifier: frozen CLIP with a learned text prompt, a learned visual prompt, or both (Eq. 1).

    Args:
        backbone: frozen CLIP, or a name or a model as for `load_backbone`.
        classnames: N class names.
        prompts: initialisation by kind (copied), (M, d) or, deep, (layers, M, d).
        template: class prompt if there is no text prompt.
    """

    def __init__(
        self,
        backbone: Backbone | nn.Module | str,
        classnames: Sequence[str],
        prompts: Mapping[str, Tensor],
        template: str = TEMPLATE,
    ) -> None:
        super().__init__()
        self.backbone = backbone = load_backbone(backbone)
        self.prompt_learner = PromptLearner(prompts).to(backbone.device)
        ctx = self.prompt_learner.ctx
        self.class_text = ClassText(backbone, classnames, ctx.shape[-2]) if ctx is not None else None
        self.fixed = template_features(backbone, classnames, template) if ctx is None else None  # (N, D)
        self._recorded: dict[str, Recorded] = {}  # passes through the towers, see `record`
        # A prompt's place and version, the prompt (so that no other takes its place), its class features
        self._kept: tuple[tuple[int, int], Tensor, Tensor] | None = None

    def prompts(self) -> dict[str, nn.Parameter]:
        """Return the learned prompts, (M, d) or (layers, M, d), by kind."""
        return self.prompt_learner.prompts()

    def parameters_to_learn(self) -> list[nn.Parameter]:
        """Return the parameters for an optimiser; the towers are frozen."""
        return list(self.prompt_learner.parameters())

    def class_features(self) -> Tensor:
        """Return the class features (N, D); without gradients they are computed once for a prompt, not once a batch."""
        ctx = self.prompt_learner.ctx
        if self.fixed is not None:
            return self.fixed
        assert ctx is not None and self.class_text is not None  # one of the two, by construction
        prompt = self._text_inputs(ctx)
        if torch.is_grad_enabled():
            return self._encode_classes(*prompt)
        state = ctx.data_ptr(), ctx._version  # to compare values would make a GPU wait
        if self._kept is None or self._kept[0] != state:
            self._kept = state, ctx.detach(), self.class_text.features(*prompt)
        return self._kept[2]

    def image_features(self, images: Tensor) -> Tensor:
        """Return the features (B, D) of images (B, 3, H, W)."""
        prompt = self.visual_prompt()
        encode = self._recorded.get("images", self.backbone.encode_images)
        return encode(images) if prompt is None else encode(images, *by_layer(prompt))

    def visual_prompt(self) -> Tensor | None:
        """Return the visual prompt, (M, d) or (layers, M, d), or None."""
        return self.prompt_learner.visual_ctx

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, N), the exponents of Eq. 1."""
        return logits(self.image_features(images), self.class_features(), self.backbone.logit_scale)

    def record(self, images: Tensor) -> None:
        """Record the towers' passes in a training step on images (B, 3, H, W) as CUDA graphs (`Recorded`).

        Passes that compute activations twice to save memory stay as they are. If a pass cannot be recorded, a
        `RuntimeError` says why, and none is.
        """
        visual, ctx, towers = self.visual_prompt(), self.prompt_learner.ctx, self.backbone.checkpointing
        recorded = {}
        if visual is None or towers not in (True, "images"):
            inputs = () if visual is None else by_layer(visual)
            recorded["images"] = Recorded(self.backbone.encode_images, images, *map(_sample, inputs))
        text = self.class_text
        if text is not None and ctx is not None and not text.chunk and towers not in (True, "text"):
            inputs = self._text_inputs(self._sample_context(ctx, len(images)))
            recorded["classes"] = Recorded(text.features, *map(_sample, inputs))
        self._recorded = recorded

    def _sample_context(self, ctx: Tensor, images: int) -> Tensor:
        """Return a text prompt such as a training step on so many images makes of the learned one."""
        return ctx

    def _text_inputs(self, ctx: Tensor) -> tuple[Tensor, ...]:
        """Return a text prompt as `ClassText.features` takes it: that of the first layer, and any further ones."""
        assert self.class_text is not None
        # a placed prompt may be one for each class, (N, M, d), which is not deep
        return (ctx,) if self.class_text.placed else by_layer(ctx)

    def _encode_classes(self, *prompt: Tensor) -> Tensor:
        assert self.class_text is not None
        return self._recorded.get("classes", self.class_text.features)(*prompt)


class CoupledCLIP(PromptedCLIP):
    """MaPLe's classifier: deep text prompts, and visual prompts that coupling functions make of them (`coupled`).

    Args:
        prompts: initialisation: `"text"` (layers, M, d_text).
        coupling: initialisation of `coupling.weight` and `coupling.bias`; learned as `prompt_learner.coupling`.
    """

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        prompts: Mapping[str, Tensor],
        coupling: Mapping[str, Tensor],
    ) -> None:
        super().__init__(backbone, classnames, prompts)
        values = {name.partition(".")[2]: nn.Parameter(coupling[name].detach().clone().float()) for name in COUPLING}
        self.prompt_learner.add_module("coupling", nn.ParameterDict(values).to(backbone.device))

    def visual_prompt(self) -> Tensor | None:
        return coupled({**self.prompts(), **dict(self.prompt_learner.named_parameters())})


class ConditionalCLIP(PromptedCLIP):
    """CoCoOp's classifier: the text prompt is shifted for each image by a meta-net of the image's feature.

    Args:
        net: initialisation of the meta-net (see `initial_meta_net`); it is learned as `prompt_learner.meta_net`.
    """

    def __init__(
        self, backbone: Backbone, classnames: Sequence[str], prompts: Mapping[str, Tensor], net: Mapping[str, Tensor]
    ) -> None:
        super().__init__(backbone, classnames, prompts)
        hidden, width = net["linear1.weight"].shape
        meta_net = MetaNet(width, hidden, backbone.text_width).to(backbone.device)
        meta_net.load_state_dict(dict(net))
        self.prompt_learner.add_module("meta_net", meta_net)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, N); each image has its own class features."""
        return self.image_logits(self.image_features(images))

    def image_logits(self, features: Tensor) -> Tensor:
        """Return the logits (B, N) of image features (B, D)."""
        ctx = self.prompt_learner.ctx
        assert ctx is not None and self.class_text is not None  # it has a text prompt, by construction
        shift = self.prompt_learner.get_submodule("meta_net")(features)  # (B, d)
        classes = self._encode_classes(ctx + shift[:, None])  # (B, N, D)
        return logits(features[:, None], classes, self.backbone.logit_scale).squeeze(1)

    def _sample_context(self, ctx: Tensor, images: int) -> Tensor:
        return ctx.expand(images, -1, -1)  # (B, M, d)

    def _text_inputs(self, ctx: Tensor) -> tuple[Tensor, ...]:
        return (ctx,)  # one for each image, which is not deep


def logits(image_features: Tensor, class_features: Tensor, scale: Tensor) -> Tensor:
    """Return scaled cosines (..., B, N) of normalised features (..., B, D) and (..., N, D): the exponents of Eq. 1."""
    return scale * image_features @ class_features.transpose(-1, -2)


def _sample(value: Tensor) -> Tensor:
    """Return an input to record a pass with: a parameter itself, or a copy of what is computed from parameters."""
    return value if value.is_leaf else value.detach().clone().requires_grad_()


def _parameter(value: Tensor | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value.detach().clone().float())
