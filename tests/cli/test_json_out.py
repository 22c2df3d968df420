"""What the commands print as JSON is valid JSON."""

import json

import pytest

from gram_meta.cli import main
from gram_meta.commands.check_data import as_json
from gram_meta.datasets.check import Finding
from gram_meta.errors import GramError
from gram_meta.files import to_json
from gram_meta.tools import doctor


def test_check_data_prints_no_nan():
    with pytest.raises(GramError, match="--json: expected finite numbers"):
        as_json([Finding("pets", "here", images={"train": float("nan")})])


def test_doctor_prints_no_nan(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", [("it", lambda _: iter([doctor.Check("it", doctor.FINE, float("inf"))]), ())])
    assert main(["doctor", "--format", "json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "--format json: expected finite numbers" in printed.err


def test_a_path_that_is_no_text_is_escaped():
    path = b"caf\xe9/\xc3\xa4".decode("utf-8", "surrogateescape")
    text = to_json({"path": path}, "here")
    assert text.encode() == b'{"path": "caf\\udce9/\xc3\xa4"}'
    assert json.loads(text)["path"] == path
