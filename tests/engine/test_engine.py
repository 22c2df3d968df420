"""The built-in engine against what Dassl is documented to do, number by number, and the adapter in front of it."""

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gram_meta import engine
from gram_meta.engine import adapter
from gram_meta.errors import GramError
from gram_meta.random_state import kept_random_state, random_state, set_random_state

if engine.backend() != "builtin":
    pytest.skip("the real Dassl is the backend: these are tests of the built-in engine", allow_module_level=True)

from dassl.data import DataManager, DatasetWrapper
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from dassl.data.transforms import build_transform
from dassl.engine import TRAINER_REGISTRY, TrainerX
from dassl.evaluation import build_evaluator
from dassl.metrics import compute_accuracy
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.utils import (
    AverageMeter,
    Logger,
    MetricMeter,
    Registry,
    check_availability,
    load_checkpoint,
    load_pretrained_weights,
    save_checkpoint,
    set_random_seed,
    setup_logger,
)


def config(*opts):
    cfg = engine.get_cfg_default()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.merge_from_list(list(opts))
    return cfg


@pytest.fixture
def images(tmp_path):
    """12 images of 3 classes as `Datum`."""
    rng = np.random.default_rng(0)
    items = []
    for index in range(12):
        path = tmp_path / f"{index}.png"
        Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(path)
        items.append(Datum(str(path), label=index % 3, domain=index % 2, classname=f"class {index % 3}"))
    return items


# ------------------------------------------------------------------------------------------------------------ adapter


def test_the_builtin_engine_answers_as_dassl():
    import dassl
    import dassl.data.datasets.base_dataset
    import dassl.engine.trainer

    assert dassl.engine.trainer.TrainerX is engine.TrainerX is TrainerX
    assert dassl.data.datasets.base_dataset.Datum is engine.Datum


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="TrainerZ"):
        _ = engine.TrainerZ


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wish", "real", "expected"),
    [("auto", True, "real"), ("real", True, "real"), ("auto", False, "broken"), ("wrong", True, "GramError")],
)
def test_the_adapter_chooses_a_backend(tmp_path, wish, real, expected):
    """In a process of its own, with a `dassl` on the path that does or does not import (no torch needed)."""
    package = tmp_path / "dassl"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "engine.py").write_text("TrainerX = 'theirs'" if real else "import no_such_module_here")
    code = (
        "from gram_meta import engine\n"
        "engine.adapter._import_builtin = lambda: 'broken'\n"
        "try: print(engine.backend())\n"
        "except ValueError as error: print(type(error).__name__)\n"
    )
    root = Path(engine.__file__).resolve().parents[2]
    env = {**os.environ, "GRAM_DASSL": wish, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert out.stdout.strip() == expected, out.stderr
    assert ("steps in" in out.stderr) == (expected == "broken")


def test_real_is_refused_where_there_is_none():
    if adapter._has_real():
        pytest.skip("a real Dassl is installed here")
    with pytest.raises(GramError, match="no package `dassl`"):
        adapter._import_real()


# -------------------------------------------------------------------------------------------------------- registry


def test_registry():
    registry = Registry("THING")

    @registry.register()
    class Apple:
        pass

    assert registry.get("Apple") is Apple
    assert registry.registered_names() == ["Apple"]
    with pytest.raises(KeyError, match="already"):
        registry.register(Apple)
    registry.register(Apple, force=True)
    with pytest.raises(KeyError, match='nearest: "Apple"'):
        registry.get("Appel")
    with pytest.raises(ValueError, match="did you mean 'Apple'"):
        check_availability("Appel", ["Pear", "Apple"])


# ------------------------------------------------------------------------------------------------------- schedules


def rates(epochs, *opts):
    parameter = nn.Parameter(torch.zeros(1))
    cfg = config("OPTIM.NAME", "sgd", "OPTIM.LR", 0.002, "OPTIM.MAX_EPOCH", epochs, *opts).OPTIM
    optimizer = build_optimizer([parameter], cfg)
    scheduler = build_lr_scheduler(optimizer, cfg)
    seen = []
    for _ in range(epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


COSINE = ("OPTIM.LR_SCHEDULER", "cosine")
CONSTANT = ("OPTIM.WARMUP_EPOCH", 1, "OPTIM.WARMUP_TYPE", "constant")


def test_cosine_after_a_constant_warmup_has_dassls_rates():
    assert rates(5, *COSINE, *CONSTANT) == pytest.approx([1e-5, 0.002, 0.0018090, 0.0013090, 0.0006910], rel=1e-4)


def test_warmup_without_recount_skips_the_epochs_it_took():
    without = rates(5, *COSINE, *CONSTANT, "OPTIM.WARMUP_RECOUNT", False)
    # the successor stands at epoch 1 already, so its first step is torch's recursion from epoch 1 to epoch 2
    cos = [1 + np.cos(np.pi * e / 5) for e in range(6)]
    assert without == pytest.approx([1e-5, 0.002, *(0.002 * cos[e] / cos[1] for e in (2, 3, 4))], rel=1e-6)


def test_linear_warmup_and_steps():
    linear = ("OPTIM.WARMUP_EPOCH", 4, "OPTIM.WARMUP_TYPE", "linear", "OPTIM.WARMUP_MIN_LR", 1e-4)
    stepped = ("OPTIM.LR_SCHEDULER", "single_step", "OPTIM.STEPSIZE", (2,), "OPTIM.GAMMA", 0.5)
    expected = [1e-4, 0.0005, 0.001, 0.0015, 0.002, 0.002, 0.001, 0.001]
    assert rates(8, *linear, *stepped) == pytest.approx(expected)
    many = ("OPTIM.LR_SCHEDULER", "multi_step", "OPTIM.STEPSIZE", (1, 3))
    assert rates(5, *many) == pytest.approx([0.002, 0.0002, 0.0002, 0.00002, 0.00002])
    assert rates(3, "OPTIM.LR_SCHEDULER", "single_step") == [0.002] * 3  # STEPSIZE -1: after the last epoch


@pytest.mark.parametrize(
    "opts",
    [
        (*COSINE, *CONSTANT),
        ("OPTIM.LR_SCHEDULER", "multi_step", "OPTIM.STEPSIZE", (2, 5), *CONSTANT),
        ("OPTIM.LR_SCHEDULER", "single_step", "OPTIM.STEPSIZE", (3,), "OPTIM.WARMUP_EPOCH", 3),
        COSINE,
    ],
)
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_schedule_goes_on_after_its_state_went_through_a_file(tmp_path, opts, stop):
    cfg = config("OPTIM.NAME", "sgd", "OPTIM.LR", 0.002, "OPTIM.MAX_EPOCH", 7, *opts).OPTIM

    def build():
        optimizer = build_optimizer([nn.Parameter(torch.zeros(1))], cfg)
        return optimizer, build_lr_scheduler(optimizer, cfg)

    optimizer, scheduler = build()
    for _ in range(stop):
        optimizer.step()
        scheduler.step()
    torch.save({"o": optimizer.state_dict(), "s": scheduler.state_dict()}, tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)  # plain values only
    optimizer, scheduler = build()
    optimizer.load_state_dict(state["o"])
    scheduler.load_state_dict(state["s"])
    seen = []
    for _ in range(stop, 7):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == rates(7, *opts)[stop:]


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_optimisers_by_name(name, kind):
    model = nn.Linear(2, 2)
    cfg = config("OPTIM.NAME", name, "OPTIM.ADAM_BETA1", 0.8, "OPTIM.WEIGHT_DECAY", 0.25).OPTIM
    optimizer = build_optimizer(model, cfg)
    group = optimizer.param_groups[0]
    assert type(optimizer) is kind
    assert group["lr"] == cfg.LR and group["weight_decay"] == 0.25
    assert group.get("betas", (0.8, 0.999)) == (0.8, 0.999)
    assert group.get("momentum", 0.9) == 0.9


@pytest.mark.parametrize(
    ("opts", "says"),
    [
        (("OPTIM.NAME", "rmsprop"), "OPTIM.NAME is 'rmsprop'; .* knows adam, adamw, sgd. The real Dassl has more"),
        (("OPTIM.LR_SCHEDULER", "cosin"), "OPTIM.LR_SCHEDULER is 'cosin'"),
        (("OPTIM.WARMUP_EPOCH", 1, "OPTIM.WARMUP_TYPE", "slow"), "OPTIM.WARMUP_TYPE is 'slow'"),
        (("OPTIM.STAGED_LR", True), "OPTIM.STAGED_LR is True; the built-in engine knows False"),
    ],
)
def test_unknown_optimisation_options(opts, says):
    with pytest.raises(GramError, match=says):
        rates(2, *opts)


# ------------------------------------------------------------------------------------------------------- evaluator


def test_evaluator_by_hand(capsys, tmp_path):
    """True 0 0 0 1 1 2, predicted 0 0 1 1 2 3: 3 of 6; F1 of classes 0, 1, 2: 4/5, 1/2, 0; 3 never occurs."""
    cfg = config("TEST.PER_CLASS_RESULT", True, "OUTPUT_DIR", str(tmp_path))
    evaluator = build_evaluator(cfg, lab2cname={0: "a", 1: "b", 2: "c", 3: "d"})
    true, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 3]
    scores = torch.nn.functional.one_hot(torch.tensor(predicted), 4).float()
    evaluator.process(scores[:4], torch.tensor(true[:4]))
    evaluator.process(scores[4:], torch.tensor(true[4:]))
    results = evaluator.evaluate()
    assert list(results) == ["accuracy", "error_rate", "macro_f1", "perclass_accuracy"]
    assert results["accuracy"] == 50.0 and results["error_rate"] == 50.0
    assert results["macro_f1"] == pytest.approx(100 * (0.8 + 0.5 + 0.0) / 3)
    assert results["perclass_accuracy"] == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)
    out = capsys.readouterr().out
    expected = "=> result\n* total: 6\n* correct: 3\n* accuracy: 50.0%\n* error: 50.0%\n* macro_f1: 43.3%\n"
    assert expected in out
    assert "=> per-class result\n* class: 0 (a)\ttotal: 3\tcorrect: 2\tacc: 66.7%\n" in out
    assert "* average: 38.9%\n" in out
    evaluator.reset()
    assert evaluator._total == 0


def test_macro_f1_is_the_mean_over_the_classes_that_occur(tmp_path):
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 6, 200), rng.integers(0, 8, 200)
    evaluator = build_evaluator(config("OUTPUT_DIR", str(tmp_path)))
    evaluator.process(torch.eye(8)[predicted], torch.tensor(true))
    scores = []
    for label in np.unique(true):
        is_true, is_predicted = true == label, predicted == label
        scores.append(2 * np.sum(is_true & is_predicted) / (is_true.sum() + is_predicted.sum()))
    assert evaluator.evaluate()["macro_f1"] == pytest.approx(100 * np.mean(scores), rel=1e-12)


def test_accuracy_of_a_batch():
    output = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 3.0, 2.0]])
    one, two = compute_accuracy(output, torch.tensor([0, 1, 0, 2]), topk=(1, 2))
    assert one.item() == 25.0 and two.item() == 75.0 and one.shape == (1,)


def test_meters():
    meter = AverageMeter()
    meter.update(1.0)
    meter.update(torch.tensor(4.0), n=2)
    assert (meter.val, meter.avg) == (4.0, 3.0)
    meters = MetricMeter()
    meters.update({"loss": 1.0, "acc": 50.0})
    meters.update({"loss": 2.0, "acc": 100.0})
    assert str(meters) == "loss 2.0000 (1.5000) acc 100.0000 (75.0000)"
    with pytest.raises(TypeError):
        meters.update([1.0])


# ------------------------------------------------------------------------------------------------------------ data


def test_datum_and_dataset(images, capsys):
    with pytest.warns(UserWarning, match="No file found"), pytest.raises(AssertionError):
        Datum("no such file.png")
    with pytest.raises(AttributeError):
        images[0].label = 2
    data = DatasetBase(train_x=images, test=images)
    assert (data.num_classes, data.classnames) == (3, ["class 0", "class 1", "class 2"])
    random.seed(7)
    few = data.generate_fewshot_dataset(images, num_shots=2)
    random.seed(7)
    by_label = [[i for i in images if i.label == label] for label in (0, 1, 2)]
    assert few == [item for group in by_label for item in random.sample(group, 2)]
    assert len(data.generate_fewshot_dataset(images, num_shots=9)) == 12  # what there is
    assert len(data.generate_fewshot_dataset(images, num_shots=9, repeat=True)) == 27
    first, second = data.generate_fewshot_dataset(images, images[:3], num_shots=1)
    assert (len(first), len(second)) == (3, 3)
    assert data.generate_fewshot_dataset(images) is images
    assert "Creating a 2-shot dataset" in capsys.readouterr().out


def test_few_shot_pickles_name_dassls_class(images):
    assert b"dassl.data.datasets.base_dataset" in pickle.dumps(images[0])
    assert pickle.loads(pickle.dumps(images))[3].impath == images[3].impath


def test_a_spawned_worker_can_read_the_dataset(images):
    """The wrapper's pickle brings the name `dassl` into being before the first `Datum` needs it."""
    data = pickle.dumps(DatasetWrapper(config(), images, transform=None))
    assert data.index(b"_restore_wrapper") < data.index(b"dassl.data.datasets.base_dataset")
    assert pickle.loads(data).data_source[0].label == 0


def test_training_transform_is_crop_flip_normalise_from_torchs_generator(images):
    """The same draws in the same order as torchvision's own three transforms: equal crops from equal seeds."""
    import torchvision.transforms as T

    names = ["random_resized_crop", "random_flip", "normalize"]
    cfg = config("INPUT.SIZE", (16, 16), "INPUT.INTERPOLATION", "bicubic", "INPUT.TRANSFORMS", names)
    transform = build_transform(cfg, is_train=True)
    plain = T.Compose(
        [
            T.RandomResizedCrop((16, 16), scale=(0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD),
        ]
    )
    image = Image.open(images[0].impath).convert("RGB")
    for seed in range(5):
        torch.manual_seed(seed)
        one = transform(image)
        torch.manual_seed(seed)
        assert torch.equal(one, plain(image))


def test_test_transform_resizes_the_smaller_edge_and_crops(images):
    cfg = config("INPUT.SIZE", (16, 16))
    image = Image.open(images[0].impath).convert("RGB")  # 30 wide, 40 high
    out = build_transform(cfg, is_train=False)(image)
    assert out.shape == (3, 16, 16) and 0 <= out.min() and out.max() <= 1


@pytest.mark.parametrize("is_train", [True, False])
def test_crops_on_tensors_are_those_of_images_up_to_rounding(is_train):
    """Of a smooth picture, as photographs are at the scale of a pixel; the same random numbers are drawn."""
    height, width = np.mgrid[:300, :400]
    waves = [127.5 + 127.5 * np.sin(height / a + width / b) for a, b in ((9, 17), (21, 13), (40, 8))]
    image = Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))
    options = ("INPUT.SIZE", (64, 64), "INPUT.INTERPOLATION", "bicubic")
    options += ("INPUT.TRANSFORMS", ("random_resized_crop", "random_flip", "normalize"))
    one, other = (build_transform(config(*options, "INPUT.CROP_ON", on), is_train) for on in ("images", "tensors"))
    std = torch.tensor(config().INPUT.PIXEL_STD).view(3, 1, 1)
    for seed in range(5):
        torch.manual_seed(seed)
        expected, after = one(image), torch.rand(1)
        torch.manual_seed(seed)
        found = other(image)
        assert torch.equal(torch.rand(1), after)
        assert found.dtype == torch.float32 and found.shape == expected.shape == (3, 64, 64)
        levels = ((found - expected) * std * 255).round().abs()
        assert levels.max() <= 2 and levels.mean() < 0.05 and (expected - expected.mean()).abs().mean() > 0.5


@pytest.mark.parametrize("is_train", [True, False])
def test_every_transform_of_the_builtin_engine_runs(images, is_train):
    from dassl.data.transforms.transforms import AVAI_CHOICES

    image = Image.open(images[0].impath).convert("RGB")
    for name in AVAI_CHOICES:
        for on in ("images", "tensors", "device"):
            cfg = config("INPUT.SIZE", (16, 16), "INPUT.TRANSFORMS", (name,), "INPUT.CROP_ON", on)
            assert build_transform(cfg, is_train=is_train)(image).shape == (3, 16, 16)


def test_transforms_refuse_what_they_do_not_have():
    with pytest.raises(GramError, match="INPUT.TRANSFORMS is 'random_flop'; the built-in engine knows random_flip, "):
        build_transform(config("INPUT.TRANSFORMS", ("random_flop",)))
    with pytest.raises(GramError, match="'randaugment'.* The real Dassl has more: pip install "):
        build_transform(config("INPUT.TRANSFORMS", ("randaugment",)))
    with pytest.raises(GramError, match="INPUT.INTERPOLATION is 'cubic'"):
        build_transform(config("INPUT.INTERPOLATION", "cubic"))


@pytest.mark.parametrize(("batch", "batches"), [(5, 2), (12, 1), (13, 1)])
def test_training_loader_drops_a_short_batch_when_there_is_a_full_one(images, batch, batches):
    cfg = config("INPUT.SIZE", (8, 8))
    transform = build_transform(cfg)
    train = engine.build_data_loader(cfg, "RandomSampler", images, batch, tfm=transform, is_train=True)
    test = engine.build_data_loader(cfg, "SequentialSampler", images, batch, tfm=transform, is_train=False)
    assert len(train) == batches
    assert sum(len(b["label"]) for b in test) == 12
    first = next(iter(test))
    assert set(first) == {"img", "label", "domain", "impath", "index"}
    assert first["index"].tolist() == list(range(min(batch, 12)))
    with pytest.raises(GramError, match="has no images"):
        engine.build_data_loader(cfg, "SequentialSampler", [], 4)


def test_several_transforms_give_several_images(images):
    cfg = config("INPUT.SIZE", (8, 8))
    transform = build_transform(cfg)
    item = DatasetWrapper(cfg, images, transform=[transform, transform], is_train=False)[0]
    assert item["img"].shape == item["img2"].shape == (3, 8, 8)
    assert DatasetWrapper(cfg, images)[0]["img"].size == (30, 40)


@pytest.mark.parametrize("is_train", [True, False])
def test_samplers(images, is_train):
    key = "DATALOADER.TRAIN_X.SAMPLER" if is_train else "DATALOADER.TEST.SAMPLER"
    with pytest.raises(GramError, match=f"{key} is 'RandomDomainSampler'; .* knows RandomSampler, SequentialSampler"):
        engine.build_data_loader(config(), "RandomDomainSampler", images, 4, is_train=is_train)
    loader = engine.build_data_loader(config(), "RandomSampler", images, 4, is_train=is_train)
    assert sorted(loader.sampler) == list(range(12)) != list(loader.sampler)
    assert list(engine.build_data_loader(config(), "SequentialSampler", images, 4).sampler) == list(range(12))


# ----------------------------------------------------------------------------------------------------- checkpoints


class Evil:
    def __reduce__(self):
        return os.mkdir, ("was run",)


def test_checkpoints_hold_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "epoch": 3, "x": Evil()}, tmp_path / "evil")
    assert load_checkpoint(str(tmp_path / "evil"))["epoch"] == 3
    torch.save({"state_dict": {"ctx": Evil()}}, tmp_path / "evil")
    with pytest.raises(GramError, match="expected a tensor as ctx in state_dict, found .*mkdir as an object"):
        load_checkpoint(str(tmp_path / "evil"))
    assert not (tmp_path / "was run").exists()
    with pytest.raises(FileNotFoundError):
        load_checkpoint(str(tmp_path / "none"))


def test_checkpoint_files(tmp_path, capsys):
    model = nn.Linear(2, 1)
    state = {"state_dict": {"module.weight": model.weight.data, "bias": model.bias.data}, "epoch": 3}
    save_checkpoint(state, str(tmp_path), is_best=True)
    assert (tmp_path / "checkpoint").read_text() == "model.pth.tar-3\n"
    assert set(load_checkpoint(str(tmp_path / "model-best.pth.tar"))["state_dict"]) == {"weight", "bias"}
    assert f"Checkpoint saved to {tmp_path}/model.pth.tar-3" in capsys.readouterr().out
    other = nn.Sequential(nn.Linear(2, 1))
    with pytest.warns(UserWarning, match="Cannot load"):
        load_pretrained_weights(other, str(tmp_path / "model.pth.tar-3"))
    wide = nn.Linear(3, 1)
    load_pretrained_weights(wide, str(tmp_path / "model.pth.tar-3"))
    assert torch.equal(wide.bias, model.bias)
    assert "Layers discarded due to unmatched keys or size: ['weight']" in capsys.readouterr().out


def test_random_state_survives_a_file(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1), np.random.randn()

    set_random_seed(3)
    random.gauss(0, 1)  # leaves a value in store
    torch.save(random_state(), tmp_path / "state")
    expected = draw()
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == expected
    set_random_seed(3)
    before = random_state()
    with kept_random_state():
        draw()
    assert random_state()["python"] == before["python"] and torch.equal(random_state()["torch"], before["torch"])


def test_logger_leaves_the_console_open(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    setup_logger(str(tmp_path))
    print("one")
    logger = sys.stdout
    sys.stdout = logger.console
    logger.close()
    del logger
    print("two")  # "I/O operation on closed file" under Dassl's
    assert (tmp_path / "log.txt").read_text() == "one\n"
    assert capsys.readouterr().out == "one\ntwo\n"
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    setup_logger(str(tmp_path))
    assert isinstance(sys.stdout, Logger)
    sys.stdout.close()
    assert len(list(tmp_path.glob("log.txt*"))) == 2


# --------------------------------------------------------------------------------------------------------- trainer


@pytest.fixture
def registered(images):
    """A dataset and a trainer in the registries, for one test."""

    class TinyNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = nn.Linear(3 * 8 * 8, 3)

        def forward(self, x):
            return self.classifier(x.flatten(1))

    class TinyData(DatasetBase):
        def __init__(self, cfg):
            super().__init__(train_x=images, val=images[:6], test=images)

    class TinyTrainer(TrainerX):
        def build_model(self):
            self.model = TinyNet().to(self.device)
            optimizer = build_optimizer(self.model, self.cfg.OPTIM)
            self.register_model("model", self.model, optimizer, build_lr_scheduler(optimizer, self.cfg.OPTIM))

        def forward_backward(self, batch):
            images, labels, _ = self.parse_batch_train(batch)
            output = self.model(images)
            loss = nn.functional.cross_entropy(output, labels)
            self.model_backward_and_update(loss)
            if self.batch_idx + 1 == self.num_batches:
                self.update_lr()
            return {"loss": loss.item(), "acc": compute_accuracy(output, labels)[0].item()}

    for registry, cls in ((DATASET_REGISTRY, TinyData), (TRAINER_REGISTRY, TinyTrainer)):
        registry.register(cls)
    yield SimpleNamespace(trainer=TinyTrainer)
    for registry, name in ((DATASET_REGISTRY, "TinyData"), (TRAINER_REGISTRY, "TinyTrainer")):
        registry._obj_map.pop(name)


def tiny(tmp_path, *opts):
    return config(
        "TRAINER.NAME",
        "TinyTrainer",
        "DATASET.NAME",
        "TinyData",
        "INPUT.SIZE",
        (8, 8),
        "DATALOADER.TRAIN_X.BATCH_SIZE",
        4,
        "OPTIM.NAME",
        "sgd",
        "OPTIM.LR",
        0.01,
        "OPTIM.MAX_EPOCH",
        3,
        "TRAIN.PRINT_FREQ",
        2,
        "OUTPUT_DIR",
        str(tmp_path / "out"),
        *opts,
    )


def test_a_plain_trainer_trains_tests_saves_and_logs(tmp_path, registered, capsys):
    trainer = engine.build_trainer(tiny(tmp_path))
    trainer.train()
    out = capsys.readouterr().out
    for line in ("Loading trainer: TinyTrainer", "Finish training", "Deploy the last-epoch model"):
        assert line in out.splitlines()
    for part in ("Evaluate on the *test* set", "epoch [3/3] batch [2/3] time ", " lr 1.0000e-02 eta ", "Elapsed: 0:"):
        assert part in out
    assert "batch [3/3]" not in out  # PRINT_FREQ 2
    assert (tmp_path / "out/model/checkpoint").read_text() == "model.pth.tar-3\n"
    again = engine.build_trainer(tiny(tmp_path, "SEED", 5))
    again.load_model(str(tmp_path / "out"), epoch=3)
    assert torch.equal(again.model.classifier.weight, trainer.model.classifier.weight)
    with pytest.raises(FileNotFoundError):
        again.load_model(str(tmp_path / "out"))
    assert again.resume_model_if_exist(str(tmp_path / "out")) == 3


def test_best_validation_is_kept_and_deployed(tmp_path, registered, capsys):
    trainer = engine.build_trainer(tiny(tmp_path, "TEST.FINAL_MODEL", "best_val", "TRAIN.CHECKPOINT_FREQ", 1))
    results = iter([50.0, 75.0, 60.0])
    original = trainer.test
    trainer.test = lambda split=None: next(results) if split == "val" else original(split)
    trainer.train()
    best = load_checkpoint(str(tmp_path / "out/model/model-best.pth.tar"))
    assert (best["epoch"], best["val_result"]) == (2, 75.0)
    assert torch.equal(trainer.model.classifier.weight, best["state_dict"]["classifier.weight"])
    out = capsys.readouterr().out
    assert "Deploy the model with the best val performance" in out and "(epoch=2, val_result=75.0)" in out


def test_a_loss_that_is_not_finite_stops(tmp_path, registered):
    trainer = engine.build_trainer(tiny(tmp_path))
    with pytest.raises(FloatingPointError):
        trainer.model_backward(torch.tensor(float("nan")))


def test_models_are_registered_once(tmp_path, registered):
    trainer = engine.build_trainer(tiny(tmp_path))
    with pytest.raises(AssertionError):
        trainer.register_model("model", nn.Linear(1, 1))
    with pytest.raises(AssertionError):
        trainer.get_model_names("other")
    with pytest.raises(KeyError):
        trainer.set_model_mode("walk")
    assert trainer.get_current_lr() == 0.01
    with pytest.raises(GramError, match="did you mean 'TinyTrainer'"):
        engine.build_trainer(tiny(tmp_path, "TRAINER.NAME", "TinyTraner"))


@pytest.mark.parametrize(
    ("key", "value", "default"),
    [("DATALOADER.K_TRANSFORMS", 2, 1), ("DATALOADER.RETURN_IMG0", True, False), ("TEST.COMPUTE_CMAT", True, False)],
)
def test_an_option_that_only_the_real_dassl_follows_is_refused(tmp_path, registered, key, value, default):
    with pytest.raises(GramError, match=f"{key} is {value}; the built-in engine knows {default}. The real Dassl has"):
        engine.build_trainer(tiny(tmp_path, key, value))


def test_it_trains_without_tensorboard(tmp_path, registered, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    engine.build_trainer(tiny(tmp_path)).train()
    assert "TensorBoard is not installed" in capsys.readouterr().out


def test_data_manager_summary(tmp_path, registered, capsys):
    manager = DataManager(tiny(tmp_path))
    out = capsys.readouterr().out
    assert "Dataset    TinyData" in out and "# train_x  12" in out and "# val      6" in out
    assert manager.lab2cname == {0: "class 0", 1: "class 1", 2: "class 2"}
    assert json.dumps(manager.num_classes) == "3"


@pytest.mark.parametrize("every", [2, 3, 10])
def test_tensors_of_steps_are_written_as_floats_are(every, capsys):
    """Five steps; lines are printed every so many of them. Every step's scalars are written, with its own rate."""
    from gram_meta.engine.builtin.engine import TrainerX as Builtin

    def scalars(make):
        class Trainer(Builtin):
            def __init__(self):
                self.cfg = SimpleNamespace(TRAIN=SimpleNamespace(PRINT_FREQ=every))
                self.epoch, self.max_epoch, self.train_loader_x, self.written = 1, 3, range(5), []

            def set_model_mode(self, mode):
                pass

            def get_current_lr(self):
                return 0.1 * self.batch_idx

            def forward_backward(self, batch):
                return None if batch == 3 else {"loss": make(1 / (1 + batch)), "acc": make([100.0 * batch]), "plain": 3}

            def write_scalar(self, tag, value, step):
                self.written.append((tag, step, value))

        trainer = Trainer()
        trainer.run_epoch()
        return trainer.written, [line.split(" loss ")[1] for line in capsys.readouterr().out.splitlines()]

    plain, lines = scalars(lambda x: torch.tensor(x).item())
    assert scalars(torch.tensor) == (plain, lines)
    assert len(lines) == {2: 2, 3: 1, 10: 5}[every]
    assert [step for tag, step, _ in plain if tag == "train/loss"] == [5, 6, 7, 8, 9]
    assert [value for tag, _, value in plain if tag == "train/acc"] == [0, 50, 100, 100, 175]
    assert [value for tag, _, value in plain if tag == "train/lr"] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
