"""Equations of the paper against independent calculations in float64."""

import math

import numpy as np
import pytest
import torch

from gram_meta.errors import GramError
from gram_meta.method.bilevel import InnerLoop, for_each_task, inner_path, inner_products, meta_losses, task_gradients
from gram_meta.method.episodes import TaskSet
from gram_meta.method.prompts import ClassText
from gram_meta.method.regulator import GradientRegulator, RegulatorConfig

pytestmark = pytest.mark.usefixtures("clip_layer_norm_in_float64")

PRECISION = "fp64"  # of the fixture `backbone`

ALPHA = 0.05
TOKENS = 3


@pytest.fixture(scope="module")
def sides(backbone):
    """Support and query side of three 3-way tasks over random image features."""
    text = ClassText(backbone, ["cat", "a big dog", "house", "sea lion", "tree"], TOKENS)
    random = torch.Generator().manual_seed(3)
    classes = torch.tensor([[0, 1, 2], [3, 1, 4], [2, 4, 0]])

    def side(shots):
        images = torch.randn(3, 3, shots, 64, generator=random, dtype=torch.float64)
        return TaskSet(backbone, text.select(classes), torch.nn.functional.normalize(images, dim=-1))

    return side(2), side(4)


@pytest.fixture
def theta():
    return {"text": (0.05 * torch.randn(TOKENS, 64, generator=torch.Generator().manual_seed(5))).double()}


def curved_regulator(seed=7, **form):
    """A regulator that bends its input visibly, so that an error in any of its terms shows."""
    regulator = GradientRegulator({"text": 64}, RegulatorConfig(**form)).double()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in regulator.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random, dtype=torch.float64))
    return regulator


def total(sides, theta, regulator, steps=1, first_order=False):
    return meta_losses(*sides, theta, 3, InnerLoop(ALPHA, steps, first_order, regulate=regulator)).losses.sum()


def slope(function, h=1e-5):
    """Central difference of fourth order at 0."""
    return (8 * (function(h) - function(-h)) - (function(2 * h) - function(-2 * h))) / (12 * h)


# --- Eq. 5 and 6 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_regulator_is_equations_5_and_6(tokens):
    regulator = curved_regulator()
    gate = regulator.gates["text"]
    g = torch.randn(2, tokens, 64, dtype=torch.float64)
    w_gamma, b_gamma, w_beta, b_beta = (
        p.detach().numpy() for p in (gate.weight_gamma, gate.bias_gamma, gate.weight_beta, gate.bias_beta)
    )
    expected = np.empty(g.shape)
    for task in range(2):
        columns = g[task].numpy().T  # d x M, as the paper writes it
        gamma = np.tanh(w_gamma @ columns + b_gamma[:, None])
        beta = np.tanh(w_beta @ columns + b_beta[:, None])
        expected[task] = (gamma * columns + beta).T
    regulated = regulator({"text": g})["text"]
    assert regulated.shape == g.shape
    np.testing.assert_allclose(regulated.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_default_start_is_a_constant_gate():
    g = torch.randn(4, 64)
    regulated = GradientRegulator({"text": 64})({"text": g})["text"]
    torch.testing.assert_close(regulated, 0.9 * g)


def test_relative_beta_and_normalised_input_scale_with_the_gradient():
    regulator = curved_regulator(input="normalised", beta="relative")
    g = torch.randn(3, 4, 64, dtype=torch.float64)
    torch.testing.assert_close(regulator({"text": 1e-4 * g})["text"], 1e-4 * regulator({"text": g})["text"])
    paper = curved_regulator()
    assert not torch.allclose(paper({"text": 1e-4 * g})["text"], 1e-4 * paper({"text": g})["text"])


def test_no_beta_leaves_a_pure_gate():
    regulator = curved_regulator(beta="none")
    zero = torch.zeros(4, 64, dtype=torch.float64)
    assert regulator({"text": zero})["text"].abs().max() == 0
    assert curved_regulator()({"text": zero})["text"].abs().max() > 0


def test_random_start_is_seeded_and_not_the_identity():
    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        return GradientRegulator({"text": 8}, RegulatorConfig(start="random"), generator).gates["text"].weight_gamma

    assert torch.equal(make(1), make(1)) and not torch.equal(make(1), make(2)) and make(1).abs().max() > 0


def test_regulator_refuses_what_it_does_not_know():
    regulator = GradientRegulator({"text": 64})
    with pytest.raises(GramError, match="found 'visual'"):
        regulator({"visual": torch.zeros(2, 64)})
    with pytest.raises(GramError, match="width 64, found 32"):
        regulator({"text": torch.zeros(2, 32)})
    with pytest.raises(GramError, match="REGULATOR.INPUT"):
        RegulatorConfig(input="row")


# --- Eq. 7 to 10 ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("form", [{}, {"input": "normalised", "beta": "relative"}])
def test_meta_gradient_of_theta_against_finite_differences(sides, theta, steps, form):
    regulator = curved_regulator(**form)
    theta["text"].requires_grad_()
    total(sides, theta, regulator, steps).backward()
    direction = torch.randn(TOKENS, 64, generator=torch.Generator().manual_seed(11)).double()

    def moved(distance):
        there = {"text": (theta["text"].detach() + distance * direction).requires_grad_()}
        return total(sides, there, regulator, steps).item()

    assert (theta["text"].grad * direction).sum().item() == pytest.approx(slope(moved), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", ["weight_gamma", "bias_gamma", "weight_beta", "bias_beta"])
def test_meta_gradient_of_phi_against_finite_differences(sides, theta, steps, name):
    regulator = curved_regulator()
    theta["text"].requires_grad_()
    total(sides, theta, regulator, steps).backward()
    parameter = getattr(regulator.gates["text"], name)
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(13), dtype=torch.float64)
    start = parameter.detach().clone()

    def moved(distance):
        with torch.no_grad():
            parameter.copy_(start + distance * direction)
        return total(sides, theta, regulator, steps).item()

    assert (parameter.grad * direction).sum().item() == pytest.approx(slope(moved), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
def test_identity_regulator_is_plain_maml(sides, theta, steps):
    """gamma = 1 and beta = 0 change nothing, to the last bit; against MAML written out for each task alone."""
    identity = GradientRegulator({"text": 64}).double()
    with torch.no_grad():
        identity.gates["text"].bias_gamma.fill_(30.0)  # tanh is exactly 1 there
    theta["text"].requires_grad_()
    regulated = torch.autograd.grad(total(sides, theta, identity, steps), theta["text"])[0]
    plain = torch.autograd.grad(total(sides, theta, None, steps), theta["text"])[0]
    assert torch.equal(regulated, plain)

    support, query = sides
    expected = torch.zeros_like(plain)
    for task in range(3):
        prompt = theta["text"]
        for _ in range(steps):
            loss = one_loss(support, task, prompt)
            prompt = prompt - ALPHA * torch.autograd.grad(loss, prompt, create_graph=True)[0]
        expected += torch.autograd.grad(one_loss(query, task, prompt), theta["text"])[0]
    torch.testing.assert_close(plain, expected, rtol=1e-9, atol=1e-12)


def one_loss(side, task, prompt):
    """Cross-entropy of one task, written plainly: uncut sentences through clip's own tower."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        features = plain_features(side, task, prompt)
    scores = side.backbone.logit_scale * side.images[task] @ features.T
    return torch.nn.functional.cross_entropy(scores, side.labels[task])


def plain_features(side, task, prompt):
    text, model = side.classes, side.backbone.model
    rows = []
    for own, end in zip(text.own[task], text.ends[task], strict=True):
        x = torch.cat([text.start, prompt, own[: end + 1]])  # (1 + M + L, d)
        x = x + model.positional_embedding[: len(x)]
        x = model.transformer(x[:, None])[:, 0]
        rows.append(double_norm(model.ln_final, x[-1]) @ model.text_projection)
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def double_norm(norm, x):
    return torch.nn.functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias)


def test_first_order_is_the_query_gradient_at_the_adapted_prompts(sides, theta):
    theta["text"].requires_grad_()
    regulator = curved_regulator()
    first = torch.autograd.grad(total(sides, theta, regulator, first_order=True), theta["text"], retain_graph=True)[0]
    inner = InnerLoop(ALPHA, first_order=True, regulate=regulator)
    (step,) = inner_path([sides[0]], for_each_task(theta, 3), inner, keep_graph=True)
    copies = {"text": step.after["text"].detach().requires_grad_()}
    torch.testing.assert_close(first, task_gradients(sides[1], copies)["text"].sum(0))
    second = torch.autograd.grad(total(sides, theta, regulator), theta["text"])[0]
    assert (first - second).norm() / second.norm() > 1e-3  # they are not the same thing


def test_first_order_still_teaches_the_regulator(sides, theta):
    theta["text"].requires_grad_()
    regulator = curved_regulator()
    total(sides, theta, regulator, first_order=True).backward()
    assert all(p.grad.abs().max() > 0 for p in regulator.parameters())


# --- Eq. 12 -----------------------------------------------------------------------------------------------------------


def test_taylor_expansion_of_the_meta_objective(sides, theta):
    """Eq. 10 minus Eq. 12 falls with the square of alpha."""
    theta["text"].requires_grad_()
    regulator = curved_regulator()
    prompts = for_each_task(theta, 3)
    regulated = regulator(task_gradients(sides[0], prompts))["text"]
    query = task_gradients(sides[1], prompts)["text"]
    flat = sides[1](prompts)

    def gap(alpha):
        exact = meta_losses(*sides, theta, 3, InnerLoop(alpha, regulate=regulator)).losses
        return (exact - (flat - alpha * (regulated * query).sum((1, 2)))).abs().max().item()

    assert gap(1e-2) > 0
    assert gap(1e-3) / gap(1e-4) == pytest.approx(100, rel=0.05)
    cosine = (regulated * query).sum((1, 2)) / (regulated.flatten(1).norm(dim=1) * query.flatten(1).norm(dim=1))
    torch.testing.assert_close(inner_products({"text": regulated}, {"text": query}), cosine)


def test_task_loss_is_equation_1(backbone, sides, theta):
    support = sides[0]
    losses = support(for_each_task(theta, 3))
    features = plain_features(support, 1, theta["text"])
    cosines = support.images[1] @ features.T
    exps = torch.exp(cosines * backbone.logit_scale)
    expected = -sum(math.log(exps[i, k] / exps[i].sum()) for i, k in enumerate(support.labels[1])) / len(cosines)
    assert losses[1].item() == pytest.approx(expected, rel=1e-10)
