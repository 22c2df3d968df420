"""Train the packaged CLIP, gram-small, on the emoji world: `python scripts/train_packaged_clip.py --out DIR`.

Contrastive training (InfoNCE both ways) of OpenAI's architecture on pictures that are rendered as they are needed. A
batch holds the same concept in several styles, so that the text tower has to read the style in a caption; pairs whose
caption is *also* true of another picture in the batch are left out of the denominator. Most steps drop 60 % of the
image patches (FLIP, Li et al. 2023); the last part sees whole pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from clip.model import CLIP
from clip.simple_tokenizer import SimpleTokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import normalize
from tqdm import tqdm

from gram_meta.backbone.packaged import NAME, save_packaged
from gram_meta.backbone.weights import PIXEL_MEAN, PIXEL_STD
from gram_meta.demo.captions import STATED, Captioner, all_words
from gram_meta.demo.emoji import concepts, load_drawings
from gram_meta.demo.roles import COMMON_STYLES, PLAIN_GROUNDS, RARE_STYLES, TEXTURED_GROUNDS, roles, roles_hash
from gram_meta.demo.styles import Look, Scenes, render, sample_scenes

TEXT_LENGTH = 20  # tokens per caption in training; 2 % of the captions are cut. The model itself has 77 positions.
SAVE_EVERY = 100  # steps

_COUNTS = dict(numbers=(0.9, 0.05, 0.05), sizes=(0.8, 0.1, 0.1), poses=(0.86, 0.09, 0.05), company=0.08)
# Teachers: all styles but the held ones, on all grounds.
FULL_LOOK = Look(
    styles={"photo": 0.3, "grey": 0.09, "blur": 0.07, "faded": 0.07, **dict.fromkeys(RARE_STYLES, 0.067)},
    grounds=dict.fromkeys(PLAIN_GROUNDS, 0.045)
    | dict.fromkeys(TEXTURED_GROUNDS, 0.054)
    | {"white": 0.25, "dark": 0.12},
    **_COUNTS,
)
# Meta and downstream concepts: common styles on plain grounds.
SHY_LOOK = Look(
    styles={**dict.fromkeys(COMMON_STYLES, 0.215), "photo": 0.355},
    grounds={**dict.fromkeys(PLAIN_GROUNDS, 0.0625), "white": 0.34, "dark": 0.16},
    **_COUNTS,
)


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run."""

    steps: int = 2000
    workers: int = 2  # processes; each has batches of its own
    batch: int = 192
    twins: int = 64  # concepts that are in a batch twice
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup: int = 100
    decay: float = 0.3  # last part of the steps, over which the learning rate falls to zero
    closing: int = 260  # steps after `steps`: half of the pictures are cropped, as few-shot training will crop them
    closing_whole: int = 60  # the last of these see whole pictures again
    keep_patches: float = 0.4
    whole: float = 0.08  # last part of the steps, which sees whole pictures
    vision_layers: int = 6
    vision_width: int = 128
    text_layers: int = 4
    text_width: int = 128
    embed_dim: int = 128
    seed: int = 1


class PretrainingPairs:
    """Pictures and captions that the packaged CLIP may see (see `roles`)."""

    def __init__(self, recipe: Recipe, progress: bool = False) -> None:
        seen = [(i, role, source) for i, role in enumerate(roles()) for source in role.seen]
        self.recipe = recipe
        self.drawings = load_drawings([(role.concept, source) for _, role, source in seen], progress=progress)
        self.concept = np.array([i for i, _, _ in seen])
        self.rows = [np.flatnonzero(self.concept == i) for i in range(len(concepts()))]
        self.shy = np.array([role.part != "teacher" for role in roles()])
        self.teachers = np.flatnonzero(~self.shy[self.concept])
        self.captioner = Captioner([r.concept.name for _, r, _ in seen], [r.concept.group for _, r, _ in seen])
        groups = np.array([concept.group for concept in concepts()])
        self.by_group = [np.flatnonzero(groups == group) for group in dict.fromkeys(groups)]

    def batch(self, step: int, worker: int = 0) -> tuple[np.ndarray, list[str], np.ndarray]:
        """Return pictures (B, 64, 64, 3) uint8, captions, and (B, B) bool: caption i is also true of picture j != i."""
        rng = np.random.default_rng([self.recipe.seed, step, 0, worker])
        chosen = self._concepts(rng)
        drawing = np.array([rng.choice(self.rows[c]) for c in chosen])
        full = asdict(sample_scenes(FULL_LOOK, drawing, self.teachers, rng))  # company in a rare style: a teacher, too
        shy = asdict(sample_scenes(SHY_LOOK, drawing, np.arange(len(self.concept)), rng))
        scenes = Scenes(**{k: np.where(self.shy[chosen], shy[k], full[k]) for k in full})
        captions, stated = self.captioner(scenes, rng)
        pictures = render(self.drawings, scenes)
        if step >= self.recipe.steps:
            pictures = crop_half(pictures, rng)
        return pictures, captions, also_true(self.concept, scenes, stated)

    def _concepts(self, rng: np.random.Generator) -> np.ndarray:
        """Take half of the concepts from one Unicode group (near neighbours), half from all; some of them twice."""
        distinct = self.recipe.batch - self.recipe.twins
        sizes = np.array([len(members) for members in self.by_group])
        group = self.by_group[rng.choice(len(sizes), p=sizes / sizes.sum())]
        near = rng.choice(group, min(len(group), distinct // 2), replace=False)
        far = np.setdiff1d(np.arange(len(self.rows)), near)
        chosen = np.concatenate([near, rng.choice(far, distinct - len(near), replace=False)])
        return np.concatenate([chosen, rng.choice(chosen, self.recipe.twins, replace=False)])


def crop_half(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Crop half of the pictures (B, 64, 64, 3) at random: 10 to 100 % of the area, resized, half of them mirrored."""
    rows = np.flatnonzero(rng.random(len(pictures)) < 0.5)
    area, ratio = (rng.uniform(0.1, 1.0, len(rows)), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), len(rows))))
    half = np.minimum(np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], 1), 1.0)  # (R, 2): x, y
    centre = (1 - half) * rng.uniform(-1, 1, (len(rows), 2))
    theta = np.zeros((len(rows), 2, 3), dtype=np.float32)
    theta[:, 0, 0] = half[:, 0] * np.where(rng.random(len(rows)) < 0.5, 1, -1)
    theta[:, 1, 1], theta[:, :, 2] = half[:, 1], centre
    source = torch.from_numpy(pictures[rows]).permute(0, 3, 1, 2).float()
    grid = F.affine_grid(torch.from_numpy(theta), list(source.shape), align_corners=False)
    crops = F.grid_sample(source, grid, align_corners=False, padding_mode="border")
    out = pictures.copy()
    out[rows] = (crops + 0.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return out


def also_true(concept: np.ndarray, scenes: Scenes, stated: np.ndarray) -> np.ndarray:
    """Return (B, B) bool: row i, column j is True if caption i also describes picture j, for i != j."""
    kind = concept[scenes.drawing]
    true = kind[:, None] == kind[None]
    for column, key in enumerate(STATED):
        fact = getattr(scenes, key)
        value = stated[:, column, None]
        true &= (value < 0) | (value == fact[None])
    np.fill_diagonal(true, False)
    return true


class Tokens:
    """CLIP's byte-pair tokens, and a compact numbering of those that occur."""

    def __init__(self, captions: list[str]) -> None:
        bpe = SimpleTokenizer()
        self.encode, self.start, self.end = bpe.encode, bpe.encoder["<|startoftext|>"], bpe.encoder["<|endoftext|>"]
        known = {self.start, self.end}.union(*map(self.encode, captions))
        self.ids = np.array(sorted(known))  # (V,) ids in CLIP's vocabulary
        self.row = {int(token): i for i, token in enumerate(self.ids)}

    def __call__(self, captions: list[str], length: int = TEXT_LENGTH) -> tuple[Tensor, Tensor]:
        """Return compact rows (B, length) and the positions of the end tokens (B,); unknown tokens are left out."""
        start, end, rows, ends = self.row[self.start], self.row[self.end], [], []
        for caption in captions:
            text = [start, *(self.row[t] for t in self.encode(caption) if t in self.row)][: length - 1]
            rows.append(text + [end] * (length - len(text)))
            ends.append(len(text))
        return torch.tensor(rows), torch.tensor(ends)


def new_model(recipe: Recipe, vocabulary: int) -> nn.Module:
    """Return OpenAI's `clip.model.CLIP` with a vocabulary of the tokens that occur."""
    torch.manual_seed(recipe.seed)
    width, heads, layers = recipe.text_width, recipe.text_width // 64, recipe.text_layers
    image = dict(image_resolution=64, vision_patch_size=8)
    image |= dict(vision_layers=recipe.vision_layers, vision_width=recipe.vision_width)
    text = dict(transformer_width=width, transformer_heads=heads, transformer_layers=layers)
    return CLIP(recipe.embed_dim, **image, context_length=77, vocab_size=vocabulary, **text).float()


def encode_image(model: nn.Module, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
    """Return image features (B, embed_dim), not normalised, from (B, 3, 64, 64); `kept` (B, K) are the patches used.

    The same function as the model's own `encode_image`, batch first and with fused attention.
    """
    v = model.visual
    x = v.conv1(pixels).flatten(2).transpose(1, 2) + v.positional_embedding[1:]  # (B, 64, d)
    if kept is not None:
        x = x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))  # (B, K, d)
    first = (v.class_embedding + v.positional_embedding[0]).expand(x.shape[0], 1, -1)
    x = v.ln_pre(torch.cat([first, x], 1))
    for block in v.transformer.resblocks:
        x = _block(block, x, causal=False)
    return v.ln_post(x[:, 0]) @ v.proj


def encode_text(model: nn.Module, rows: Tensor, ends: Tensor) -> Tensor:
    """Return text features (B, embed_dim), not normalised, from embedding rows (B, L) and the end tokens' positions."""
    x = model.token_embedding(rows) + model.positional_embedding[: rows.shape[1]]
    for block in model.transformer.resblocks:
        x = _block(block, x, causal=True)
    ends_of_texts = x[torch.arange(len(ends), device=x.device), ends]
    return model.ln_final(ends_of_texts) @ model.text_projection


def _block(block: nn.Module, x: Tensor, causal: bool) -> Tensor:
    b, t, d = x.shape
    qkv = _linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
    q, k, v = qkv.view(b, t, 3, d // 64, 64).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(b, t, d)
    x = x + _linear(y, block.attn.out_proj.weight, block.attn.out_proj.bias)
    y = _linear(block.ln_2(x), block.mlp.c_fc.weight, block.mlp.c_fc.bias)
    return x + _linear(y * torch.sigmoid(1.702 * y), block.mlp.c_proj.weight, block.mlp.c_proj.bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Multiply in bfloat16 (more than twice as fast on CPUs with AVX512_BF16); parameters and sums stay float32."""
    return F.linear(x.bfloat16(), weight.bfloat16()).float() + bias


def contrastive_loss(model, pixels, kept, rows, ends, left_out):
    """Return InfoNCE in both directions; pairs in `left_out` (B, B: caption, picture) are in no denominator."""
    image = F.normalize(encode_image(model, pixels, kept), dim=-1)
    text = F.normalize(encode_text(model, rows, ends), dim=-1)
    logits = model.logit_scale.exp() * text @ image.T  # (caption, picture)
    logits = logits.masked_fill(left_out, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, (logits.argmax(1) == target).float().mean()


def learning_rate(step: int, recipe: Recipe) -> float:
    """Return the rate: warm-up, a long constant part, a linear fall to zero; a lower fall for the closing steps."""
    if step < recipe.steps:
        fall = recipe.steps * recipe.decay
        return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup, (recipe.steps - step) / fall)
    done = step - recipe.steps
    return recipe.learning_rate * 0.6 * min(1.0, (done + 1) / 20, 1 - done / recipe.closing)


def sees_whole_pictures(step: int, recipe: Recipe) -> bool:
    """Return whether patches are no longer dropped: at the end of the main part and of the closing part."""
    if step < recipe.steps:
        return step >= int(recipe.steps * (1 - recipe.whole))
    return step >= recipe.steps + recipe.closing - recipe.closing_whole


def to_pixels(pictures: Tensor) -> Tensor:
    """Turn (B, 64, 64, 3) uint8 into normalised (B, 3, 64, 64) float32."""
    return normalize(pictures.permute(0, 3, 1, 2).float().div_(255), PIXEL_MEAN, PIXEL_STD)


class Batches(Dataset):
    """The batches of one worker as tensors; batch `step` is a pure function of (recipe, step, worker)."""

    def __init__(self, pairs: PretrainingPairs, tokens: Tokens, worker: int) -> None:
        self.pairs, self.tokens, self.worker = pairs, tokens, worker

    def __getitem__(self, step: int) -> tuple[Tensor | None, ...]:
        """Return pictures, kept patches (B, K) or None for all, token rows, the ends' positions, pairs to leave out."""
        pictures, captions, left_out = self.pairs.batch(step, self.worker)
        recipe, kept = self.pairs.recipe, None
        if not sees_whole_pictures(step, recipe):
            order = (
                np.random.default_rng([recipe.seed, step, 1, self.worker]).random((recipe.batch, 64)).argsort(axis=1)
            )
            kept = torch.from_numpy(np.sort(order[:, : int(64 * recipe.keep_patches)], axis=1))
        return (torch.from_numpy(pictures), kept, *self.tokens(captions), torch.from_numpy(left_out))


def train(recipe: Recipe, folder: Path, device: str) -> Path:
    """Train in `folder`, or resume a training there; return the path of the exported weights.

    Each of `recipe.workers` processes has one thread, computes the gradients of its own batch, and they are averaged.
    On a shared CPU this is far faster than threads that wait for one another in every layer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".meeting").unlink(missing_ok=True)
    pairs = PretrainingPairs(recipe, progress=True)  # rasterised once, shared with the workers
    words = (recipe, folder, pairs, device)
    torch.multiprocessing.start_processes(_work, words, nprocs=recipe.workers, start_method="spawn")
    return export(folder)


def _work(rank: int, recipe: Recipe, folder: Path, pairs: PretrainingPairs, device: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / '.meeting'}", rank=rank, world_size=recipe.workers)
    tokens = Tokens(all_words([role.concept.name for role in roles()]))
    model = new_model(recipe, len(tokens.ids)).to(device)
    optimisers = _optimisers(model, recipe)
    start, stop = _resume(folder, model, optimisers, device), recipe.steps + recipe.closing
    loss_of = torch.compile(contrastive_loss)  # without a C++ compiler: set TORCH_COMPILE_DISABLE=1
    workers, batches = 0 if device == "cpu" else 6, Batches(pairs, tokens, rank)
    loader = DataLoader(batches, batch_size=None, sampler=range(start, stop), num_workers=workers)
    log = open(folder / f"log{rank}.jsonl", "a", encoding="utf-8")
    bar = tqdm(loader, desc=NAME, initial=start, total=stop, mininterval=5, disable=rank > 0)
    for step, batch in zip(range(start, stop), bar, strict=True):
        for group in (group for optimiser in optimisers for group in optimiser.param_groups):
            group["lr"] = learning_rate(step, recipe)
        pictures, *rest = (part if part is None else part.to(device) for part in batch)
        loss, hits = loss_of(model, to_pixels(pictures), *rest)
        if not torch.isfinite(loss):
            raise RuntimeError(f"loss is {loss.item()} at step {step}; the last good state is {folder / 'last.pt'}")
        model.zero_grad(set_to_none=True)
        loss.backward()
        _average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if (step + 1) % 10 == 0:
            scale = model.logit_scale.exp().item()
            row = {"step": step + 1, "loss": loss.item(), "hits": hits.item(), "scale": scale}
            log.write(json.dumps(row) + "\n")
            log.flush()
            bar.set_postfix(loss=f"{row['loss']:.3f}", hits=f"{row['hits']:.2f}")
        if rank == 0 and ((step + 1) % SAVE_EVERY == 0 or step + 1 == stop):
            state = {"step": step + 1, "model": model.state_dict(), "recipe": asdict(recipe)}
            state["optimisers"] = [optimiser.state_dict() for optimiser in optimisers]
            torch.save(state, folder / "last.part")
            os.replace(folder / "last.part", folder / "last.pt")


def _average_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def _optimisers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon (orthogonalised momentum) for the towers' matrices and AdamW for the rest."""
    matrices, decay, rest = [], [], []
    for name, p in model.named_parameters():
        if p.ndim == 2 and "resblocks" in name:
            matrices.append(p)
        else:
            (decay if p.ndim >= 2 and "embedding" not in name else rest).append(p)
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    common = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    return [  # "match_rms_adamw": steps of AdamW's size, so one learning rate serves both
        torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98)),
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **common),
    ]


def _resume(folder: Path, model: nn.Module, optimisers: list[torch.optim.Optimizer], device: str) -> int:
    if not (folder / "last.pt").is_file():
        return 0
    state = torch.load(folder / "last.pt", map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    return state["step"]


def export(folder: Path) -> Path:
    """Write the state in `folder` as a packaged weights file (float16, trained embedding rows only)."""
    state = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)
    ids = Tokens(all_words([role.concept.name for role in roles()])).ids
    out = folder / "gram-small.safetensors"
    training = {"recipe": state["recipe"], "step": state["step"], "roles": roles_hash()}
    save_packaged(shrink_text_stream(state["model"]), ids, out, training)
    return out


def shrink_text_stream(model: dict[str, Tensor], std: float = 0.02) -> dict[str, Tensor]:
    """Return weights of the same function with token embeddings of the given standard deviation.

    Everything that is added to the text tower's residual stream is scaled by one factor, and its layer norms cancel it
    (exactly, but for their epsilon). Prompt learning depends on the size: CoOp's learning rate and its random
    initialisation of standard deviation 0.02 suit embeddings of OpenAI's size.
    """
    factor = std / model["token_embedding.weight"].float().std()
    added = ("attn.out_proj.weight", "attn.out_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")
    out = dict(model)
    for name, tensor in model.items():
        block = name.startswith("transformer.resblocks.") and name.endswith(added)
        if block or name in ("token_embedding.weight", "positional_embedding"):
            out[name] = tensor * factor
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="checkpoints, log and weights; a run there is resumed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    args = parser.parse_args()
    print(train(Recipe(), args.out, args.device))


if __name__ == "__main__":
    main()
