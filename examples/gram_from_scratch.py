"""GRAM for text prompts in plain torch, on one page: the regulator, the inner loop, the outer loop, a few-shot run.

    python examples/gram_from_scratch.py

The script uses nothing of `gram_meta`. CLIP comes from the package `clip`; image features are taken as given, because
they never change while CLIP is frozen and the prompt is text. Its prompts and losses equal those of `gram_meta`
(tests/method/test_from_scratch.py). Equation numbers are those of the paper.

Shapes: B tasks of a batch, K classes of a task, n images of a class, M prompt tokens, d and D the widths of the text
tower and of the joint space.
"""

import math

import clip
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class Regulator(nn.Module):
    """R^phi: maps a gradient (B, M, d) to one of the same shape (Eq. 5 and 6)."""

    def __init__(self, width, gamma=0.9):
        super().__init__()
        self.weight_gamma = nn.Parameter(torch.zeros(width, width))
        self.bias_gamma = nn.Parameter(torch.full((width,), math.atanh(gamma)))
        self.weight_beta = nn.Parameter(torch.zeros(width, width))
        self.bias_beta = nn.Parameter(torch.zeros(width))

    def forward(self, g):
        gamma = torch.tanh(g @ self.weight_gamma.T + self.bias_gamma)
        beta = torch.tanh(g @ self.weight_beta.T + self.bias_beta)
        return gamma * g + beta


class ClassFeatures:
    """Features of the sentences "[prompt] class name." in CLIP's frozen text tower (Eq. 2)."""

    def __init__(self, model, names, tokens):
        self.model, self.tokens = model, tokens
        ids = clip.tokenize([" ".join(["X"] * tokens) + f" {name}." for name in names])  # (N, 77)
        self.ends = ids.argmax(dim=1)  # the end token has the highest id
        self.embedded = model.token_embedding(ids).detach()  # (N, 77, d)

    def __call__(self, prompt, classes):
        """(B, K, D) for a prompt (B, M, d) of each task and class numbers (B, K)."""
        batch, ways = classes.shape
        sentences = self.embedded[classes]  # (B, K, 77, d)
        slots = prompt[:, None].expand(-1, ways, -1, -1)  # (B, K, M, d)
        x = torch.cat([sentences[:, :, :1], slots, sentences[:, :, 1 + self.tokens :]], dim=2)
        x = (x + self.model.positional_embedding).flatten(0, 1)  # (B K, 77, d)
        x = self.model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)  # the tower wants (77, B K, d)
        x = self.model.ln_final(x)[torch.arange(batch * ways), self.ends[classes].flatten()]  # (B K, d)
        return F.normalize(x @ self.model.text_projection, dim=1).unflatten(0, (batch, ways))


def losses(prompt, features, classes, images):
    """Mean cross-entropy of each task, (B,): Eq. 1 for images (B, K, n, D) whose row k belongs to class k."""
    batch, ways, shots, _ = images.shape
    texts = features(prompt, classes)  # (B, K, D)
    logits = features.model.logit_scale.exp() * images.flatten(1, 2) @ texts.transpose(1, 2)  # (B, K n, K)
    labels = torch.arange(ways).repeat_interleave(shots).repeat(batch)  # (B K n,)
    return F.cross_entropy(logits.flatten(0, 1), labels, reduction="none").view(batch, -1).mean(dim=1)


def adapt(theta, regulator, features, classes, support, alpha, steps):
    """Each task's own prompt (B, M, d) after `steps` regulated gradient steps on its support set (Eq. 7)."""
    prompt = theta.expand(len(classes), -1, -1)
    for _ in range(steps):
        with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no second derivative
            loss = losses(prompt, features, classes, support).sum()  # the tasks' prompts are separate: so are gradients
            (gradient,) = torch.autograd.grad(loss, prompt, create_graph=True)
        prompt = prompt - alpha * regulator(gradient)
    return prompt


def meta_train(theta, regulator, features, draw, steps, alpha=0.01, inner_steps=1, rates=(1e-3, 1e-4), clip_norm=1.0):
    """Algorithm 1. Moves theta (M, d) and the regulator's parameters phi; returns the query loss of every step.

    `draw(step)` gives B tasks: classes (B, K), support images (B, K, n, D) of one visual domain per class, and query
    images (B, K, m, D) of all domains.
    """
    phi = list(regulator.parameters())
    optimizer = torch.optim.Adam([{"params": [theta], "lr": rates[0]}, {"params": phi, "lr": rates[1]}])
    history = []
    for step in range(steps):
        classes, support, query = draw(step)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        adapted = adapt(theta, regulator, features, classes, support, alpha, inner_steps)
        loss = losses(adapted, features, classes, query).mean()  # Eq. 10
        optimizer.zero_grad()
        loss.backward()  # Eq. 8 and 9: through the inner steps, to theta and to phi
        for parameters in ([theta], phi):
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        history.append(loss.item())
    return history


def few_shot(theta, regulator, features, images, steps, rate=0.002, momentum=0.9):
    """A downstream task of N classes and images (N, n, D): start at theta, regulate every gradient (Sec. 3.3)."""
    prompt = theta.detach().clone().requires_grad_()
    optimizer = torch.optim.SGD([prompt], lr=rate, momentum=momentum)
    classes = torch.arange(len(images))[None]  # one task, all classes
    for _ in range(steps):
        optimizer.zero_grad()
        losses(prompt[None], features, classes, images[None]).sum().backward()
        with torch.no_grad():
            prompt.grad = regulator(prompt.grad)
        optimizer.step()
    return prompt.detach()


def main():
    """Meta-train on random features of six classes in two domains, then adapt to four new classes."""
    torch.manual_seed(1)
    model = clip.model.CLIP(64, 32, 2, 64, 8, 77, 49408, 64, 1, 2).eval().requires_grad_(False)
    names = ["cat", "dog", "house", "tree", "boat", "lamp", "chair", "bird", "shoe", "cup"]
    features = ClassFeatures(model, names, tokens=4)
    centres = torch.randn(len(names), 1, 64) + 0.5 * torch.randn(len(names), 2, 64)  # (classes, domains, D)

    def images_of(classes, domains):  # (B, K), (B, K, n) -> (B, K, n, D)
        return F.normalize(centres[classes[..., None], domains] + 0.3 * torch.randn(*domains.shape, 64), dim=-1)

    def draw(step, batch=4, ways=3):
        classes = torch.stack([torch.randperm(6)[:ways] for _ in range(batch)])  # (B, K)
        one_domain = torch.randint(2, (batch, ways, 1)).expand(-1, -1, 2)
        return classes, images_of(classes, one_domain), images_of(classes, torch.randint(2, (batch, ways, 4)))

    theta, regulator = (0.02 * torch.randn(4, 64)).requires_grad_(), Regulator(64)
    history = meta_train(theta, regulator, features, draw, steps=60, alpha=0.1, rates=(1e-2, 1e-3))
    first, last = history[0], sum(history[-10:]) / 10
    print(f"query loss after adaptation: {first:.3f} at the first step, {last:.3f} over the last ten")

    new = torch.arange(6, 10)
    features.embedded, features.ends = features.embedded[new], features.ends[new]
    shots = images_of(new[None], torch.zeros(1, 4, 4, dtype=torch.long))[0]
    prompt = few_shot(theta, regulator, features, shots, steps=50)
    before, after = (
        losses(p[None], features, torch.arange(4)[None], shots[None]).item() for p in (theta.detach(), prompt)
    )
    print(f"few-shot loss on new classes: {before:.3f} at theta*, {after:.3f} after 50 regulated steps")


if __name__ == "__main__":
    main()
