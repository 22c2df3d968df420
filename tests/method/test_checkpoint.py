"""The meta-checkpoint: what goes in comes out, and every wrong use is refused in one sentence."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from gram_meta.backbone.clip import load_backbone
from gram_meta.backbone.packaged import weights_path
from gram_meta.errors import GramError
from gram_meta.method.checkpoint import MetaCheckpoint, load_meta_checkpoint, save_meta_checkpoint, shipped
from gram_meta.method.regulator import GradientRegulator, RegulatorConfig


def make(backbone, regulator=True):
    generator = torch.Generator().manual_seed(1)
    form = RegulatorConfig(start="random", input="normalised", beta="relative")
    return MetaCheckpoint(
        prompts={"text": torch.randn(4, 64, generator=generator), "visual": torch.randn(2, 64, generator=generator)},
        regulator=GradientRegulator({"text": 64, "visual": 64}, form, generator) if regulator else None,
        backbone_name=backbone.name,
        backbone_fingerprint=backbone.fingerprint,
        config={"OUTER": {"STEPS": 3}},
        provenance={"step": 2},
        gradient_norms={"text": {"q50": 1.5}},
    )


@pytest.fixture
def saved(backbone, tmp_path):
    save_meta_checkpoint(tmp_path / "meta.safetensors", make(backbone))
    return tmp_path / "meta.safetensors"


def test_round_trip(backbone, saved):
    before, after = make(backbone), load_meta_checkpoint(saved)
    assert all(torch.equal(before.prompts[kind], after.prompts[kind]) for kind in before.prompts)
    gradient = {"text": torch.randn(4, 64), "visual": torch.randn(3, 64)}
    for kind, value in before.regulator(gradient).items():
        torch.testing.assert_close(after.regulator(gradient)[kind], value, rtol=0, atol=0)
    assert after.regulator.config == before.regulator.config
    assert (after.config, after.provenance, after.gradient_norms) == (
        before.config,
        before.provenance,
        before.gradient_norms,
    )
    assert not any(p.requires_grad for p in after.regulator.parameters())
    assert len(after.sha256) == 64 and after.tokens == {"text": 4, "visual": 2}
    after.check(backbone, {"text": 4, "visual": 2})


def test_what_comes_with_the_package_is_found_by_name_and_fits_its_backbone_only(backbone):
    assert list(shipped()) == [f"gram-small-{kind}" for kind in ("conditional", "joint", "text", "visual")]
    for name, path in shipped().items():
        checkpoint = load_meta_checkpoint(name)
        assert path.with_suffix(".md").read_text().startswith(f"# {name}\n")
        checkpoint.check(load_backbone("gram-small"), checkpoint.tokens, checkpoint.extras)
        with pytest.raises(GramError, match="made with, gram-small"):
            checkpoint.check(backbone, checkpoint.tokens, checkpoint.extras)
    with pytest.raises(GramError, match=rf"gram-large: expected .* one of {', '.join(shipped())}, found no such"):
        load_meta_checkpoint("gram-large")


@pytest.mark.parametrize("weights", [weights_path(), *shipped().values()], ids=lambda path: path.stem)
def test_shipped_weights_have_a_model_card(weights):
    """Data, settings, seed, scores, limits, licence; tests/report/test_results.py checks the accuracies."""
    card = weights.with_suffix(".md").read_text(encoding="utf-8")
    for row in ("data", "settings", "held-out", "average"):
        assert f"\n| {row}" in card
    assert (
        re.search(r"\bseed \|? ?1\b", card, re.IGNORECASE) and "\n## Limits\n" in card and "\n## Licence\n\nMIT" in card
    )


def test_a_checkpoint_without_a_regulator(backbone, tmp_path):
    save_meta_checkpoint(tmp_path / "plain.safetensors", make(backbone, regulator=False))
    assert load_meta_checkpoint(tmp_path / "plain.safetensors").regulator is None


def test_nothing_half_written_stays(backbone, tmp_path, monkeypatch):
    save_meta_checkpoint(tmp_path / "meta.safetensors", make(backbone))
    before = (tmp_path / "meta.safetensors").read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(GramError, match="cannot be written .disk full"):
        save_meta_checkpoint(tmp_path / "meta.safetensors", make(backbone, regulator=False))
    assert [p.name for p in tmp_path.iterdir()] == ["meta.safetensors"]
    assert (tmp_path / "meta.safetensors").read_bytes() == before


def test_wrong_uses_are_refused(backbone, saved):
    checkpoint = load_meta_checkpoint(saved)
    with pytest.raises(GramError, match=r"made with, random-tiny .*, found random-tiny-RN"):
        checkpoint.check(load_backbone("random-tiny-RN"), {"text": 4, "visual": 2})
    with pytest.raises(GramError, match="expected a text prompt, which the trainer learns, found a text.*, a visual"):
        checkpoint.check(backbone, {"text": 4})
    with pytest.raises(GramError, match=r"expected a text prompt of shape \(16, 64\), found \(4, 64\); GRAM defines"):
        checkpoint.check(backbone, {"text": 16, "visual": 2})


def rewritten(path, change_facts=None, change_tensors=None):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["gram-meta"])
    tensors = load_file(path)
    if change_facts:
        change_facts(facts)
    if change_tensors:
        change_tensors(tensors)
    save_file(tensors, path, metadata={"gram-meta": json.dumps(facts)})
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(change_facts=lambda f: f.update(format=9)), "expected meta-checkpoint format 1, found 9"),
        (dict(change_facts=lambda f: f.pop("backbone")), "found one with faults"),
        (dict(change_facts=lambda f: f["regulator"].update(beta="other")), "REGULATOR.BETA"),
        (dict(change_tensors=lambda t: t.pop("regulator.gates.text.bias_beta")), "found one with faults"),
        (dict(change_tensors=lambda t: t.update({"prompts.text": torch.zeros(64)})), "shape .M, d."),
        (dict(change_tensors=lambda t: t["prompts.text"].fill_(float("nan"))), "finite numbers"),
    ],
)
def test_damaged_files_are_refused(saved, change, says):
    with pytest.raises(GramError, match=says):
        load_meta_checkpoint(rewritten(saved, **change))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(GramError, match="found no such file"):
        load_meta_checkpoint(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(GramError, match="text.safetensors: expected a meta-checkpoint"):
        load_meta_checkpoint(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(GramError, match="a .safetensors file of something else"):
        load_meta_checkpoint(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:20])
    with pytest.raises(GramError, match="cut.safetensors"):
        load_meta_checkpoint(tmp_path / "cut.safetensors")
