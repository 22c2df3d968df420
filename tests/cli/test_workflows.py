"""The workflows: tests on each supported Python, and a release from a tag."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import gram_meta

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"


def workflow(name):
    return yaml.safe_load((WORKFLOWS / name).read_text(encoding="utf-8"))


def steps(name):
    return [step for job in workflow(name)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("name", sorted(path.name for path in WORKFLOWS.iterdir()))
def test_actions_are_pinned_by_major_version(name):
    uses = [step["uses"] for step in steps(name) if "uses" in step]
    assert uses and all(re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", action) for action in uses)
    assert workflow(name)["permissions"] == {"contents": "read"}


def test_the_suite_runs_on_each_supported_python():
    job = workflow("tests.yml")["jobs"]["tests"]
    classifiers = re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert job["strategy"]["matrix"]["python"] == classifiers == ["3.10", "3.11", "3.12", "3.13"]
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]


def test_only_the_job_that_publishes_may_ask_pypi():
    """It builds nothing: it takes the files that were checked, in the environment that PyPI trusts."""
    found = workflow("publish.yml")
    assert found[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads the key `on` as true
    build, publish = found["jobs"]["build"], found["jobs"]["publish"]
    assert publish["needs"] == "build" and publish["environment"] == "pypi"
    assert publish["permissions"] == {"id-token": "write"} and "permissions" not in build
    assert [step["uses"].split("@")[0] for step in publish["steps"]] == [
        *("actions/download-artifact", "pypa/gh-action-pypi-publish")
    ]
    assert "secrets." not in (WORKFLOWS / "publish.yml").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on PATH")
def test_the_tag_is_the_version():
    (check,) = [step["run"] for step in steps("publish.yml") if "GITHUB_REF_NAME" in step.get("run", "")]

    def run(tag):
        return subprocess.run(
            ["bash", "-e", "-c", check], cwd=ROOT, env={**os.environ, "GITHUB_REF_NAME": tag}, capture_output=True
        )

    version = gram_meta.__version__
    assert run(f"v{version}").returncode == 0
    for wrong in (version, "v0.0.1", f"v{version}rc1", "v"):
        done = run(wrong)
        assert done.returncode == 1
        assert done.stdout.decode() == f"expected the tag v{version}, found {wrong}\n"
