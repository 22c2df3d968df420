"""Defaults of every option that CoOp-style code and its YAML files can name. Names and values are Dassl's."""

from yacs.config import CfgNode as CN

from gram_meta.engine import builtin

_C = CN()
_C.VERSION = 1
_C.OUTPUT_DIR = "./output"  # log.txt, checkpoints, results.json
_C.RESUME = ""  # folder of an earlier run to go on from
_C.SEED = -1  # negative: not fixed
_C.USE_CUDA = True
_C.VERBOSE = True

_C.INPUT = CN()
_C.INPUT.SIZE = (224, 224)  # (height, width) in pixels
_C.INPUT.INTERPOLATION = "bilinear"  # bilinear, bicubic or nearest
_C.INPUT.TRANSFORMS = ()  # names, see data/transforms
_C.INPUT.NO_TRANSFORM = False
_C.INPUT.CROP_ON = "images"  # Pillow's; tensors, or tensors on the device: faster, with other roundings
_C.INPUT.PIXEL_MEAN = [0.485, 0.456, 0.406]  # ImageNet's; CLIP's stand in the YAML files
_C.INPUT.PIXEL_STD = [0.229, 0.224, 0.225]
_C.INPUT.CROP_PADDING = 4  # random_crop
_C.INPUT.RRCROP_SCALE = (0.08, 1.0)  # random_resized_crop: share of the image's area
_C.INPUT.CUTOUT_N = 1
_C.INPUT.CUTOUT_LEN = 16
_C.INPUT.GN_MEAN = 0.0  # gaussian_noise
_C.INPUT.GN_STD = 0.15
_C.INPUT.RANDAUGMENT_N = 2
_C.INPUT.RANDAUGMENT_M = 10
_C.INPUT.COLORJITTER_B = 0.4
_C.INPUT.COLORJITTER_C = 0.4
_C.INPUT.COLORJITTER_S = 0.4
_C.INPUT.COLORJITTER_H = 0.1
_C.INPUT.RGS_P = 0.2  # randomgrayscale: probability
_C.INPUT.GB_P = 0.5  # gaussian_blur: probability
_C.INPUT.GB_K = 21  # gaussian_blur: kernel size, odd

_C.DATASET = CN()
_C.DATASET.ROOT = ""  # folder that holds the datasets' folders
_C.DATASET.NAME = ""
_C.DATASET.SOURCE_DOMAINS = ()
_C.DATASET.TARGET_DOMAINS = ()
_C.DATASET.NUM_LABELED = -1
_C.DATASET.NUM_SHOTS = -1  # images per class; below 1: all of them
_C.DATASET.VAL_PERCENT = 0.1
_C.DATASET.STL10_FOLD = -1
_C.DATASET.CIFAR_C_TYPE = ""
_C.DATASET.CIFAR_C_LEVEL = 1
_C.DATASET.ALL_AS_UNLABELED = False

_C.DATALOADER = CN()
_C.DATALOADER.NUM_WORKERS = -1  # one for each core, up to 8; Dassl's own default is 4
_C.DATALOADER.K_TRANSFORMS = 1  # augmented copies of each training image
_C.DATALOADER.RETURN_IMG0 = False  # also the image without augmentation
_C.DATALOADER.TRAIN_X = CN()
_C.DATALOADER.TRAIN_X.SAMPLER = "RandomSampler"
_C.DATALOADER.TRAIN_X.BATCH_SIZE = 32
_C.DATALOADER.TRAIN_X.N_DOMAIN = 0  # RandomDomainSampler: domains per batch
_C.DATALOADER.TRAIN_X.N_INS = 16  # RandomClassSampler: images per class and batch
_C.DATALOADER.TRAIN_U = CN()
_C.DATALOADER.TRAIN_U.SAME_AS_X = True
_C.DATALOADER.TRAIN_U.SAMPLER = "RandomSampler"
_C.DATALOADER.TRAIN_U.BATCH_SIZE = 32
_C.DATALOADER.TRAIN_U.N_DOMAIN = 0
_C.DATALOADER.TRAIN_U.N_INS = 16
_C.DATALOADER.TEST = CN()
_C.DATALOADER.TEST.SAMPLER = "SequentialSampler"
_C.DATALOADER.TEST.BATCH_SIZE = 32

_C.MODEL = CN()
_C.MODEL.INIT_WEIGHTS = ""  # checkpoint to start from, matched by name and size
_C.MODEL.BACKBONE = CN()
_C.MODEL.BACKBONE.NAME = ""
_C.MODEL.BACKBONE.PRETRAINED = True
_C.MODEL.HEAD = CN()
_C.MODEL.HEAD.NAME = ""
_C.MODEL.HEAD.HIDDEN_LAYERS = ()
_C.MODEL.HEAD.ACTIVATION = "relu"
_C.MODEL.HEAD.BN = True
_C.MODEL.HEAD.DROPOUT = 0.0

_C.OPTIM = CN()
_C.OPTIM.NAME = "adam"  # adam, adamw or sgd
_C.OPTIM.LR = 0.0003
_C.OPTIM.WEIGHT_DECAY = 5e-4
_C.OPTIM.MOMENTUM = 0.9  # sgd, rmsprop
_C.OPTIM.SGD_DAMPNING = 0  # the name is spelled like this in the YAML files out there
_C.OPTIM.SGD_NESTEROV = False
_C.OPTIM.RMSPROP_ALPHA = 0.99
_C.OPTIM.ADAM_BETA1 = 0.9
_C.OPTIM.ADAM_BETA2 = 0.999
_C.OPTIM.STAGED_LR = False  # a smaller rate for all layers but NEW_LAYERS
_C.OPTIM.NEW_LAYERS = ()
_C.OPTIM.BASE_LR_MULT = 0.1
_C.OPTIM.LR_SCHEDULER = "single_step"  # single_step, multi_step or cosine
_C.OPTIM.STEPSIZE = (-1,)  # epochs; single_step takes the last one, below 1: MAX_EPOCH
_C.OPTIM.GAMMA = 0.1
_C.OPTIM.MAX_EPOCH = 10
_C.OPTIM.WARMUP_EPOCH = -1  # below 1: none
_C.OPTIM.WARMUP_TYPE = "linear"  # linear or constant
_C.OPTIM.WARMUP_CONS_LR = 1e-5  # rate of a constant warm-up
_C.OPTIM.WARMUP_MIN_LR = 1e-5  # first rate of a linear warm-up
_C.OPTIM.WARMUP_RECOUNT = True  # whether the schedule starts at 0 after the warm-up

_C.TRAIN = CN()
_C.TRAIN.CHECKPOINT_FREQ = 0  # epochs; 0: the last epoch only
_C.TRAIN.PRINT_FREQ = 10  # batches
_C.TRAIN.COUNT_ITER = "train_x"

_C.TEST = CN()
_C.TEST.EVALUATOR = "Classification"
_C.TEST.PER_CLASS_RESULT = False
_C.TEST.COMPUTE_CMAT = False  # confusion matrix
_C.TEST.NO_TEST = False
_C.TEST.SPLIT = "test"  # val or test
_C.TEST.FINAL_MODEL = "last_step"  # last_step or best_val

_C.TRAINER = CN()
_C.TRAINER.NAME = ""


# Options of the real Dassl whose defaults are all that the built-in engine follows.
FIXED = ("DATALOADER.K_TRANSFORMS", "DATALOADER.RETURN_IMG0", "TEST.COMPUTE_CMAT")


def get_cfg_default() -> CN:
    """Return a fresh copy of the defaults, to be extended and merged into."""
    return _C.clone()


def check_options(cfg: CN) -> None:
    """Raise a `GramError` for an option that only the real Dassl follows."""
    for key in FIXED:
        node, name = key.split(".")
        if cfg[node][name] != _C[node][name]:
            raise builtin.not_built_in(key, cfg[node][name], [repr(_C[node][name])])
