"""Settings: defaults, files, overrides, and what is said about mistakes."""

import pytest

from gram_meta.config import as_dict, did_you_mean, load_meta_config
from gram_meta.errors import GramError


def test_files_then_options_override_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("OUTER:\n  STEPS: 7\n  LR_PROMPT: 1\nTASKS: {WAYS: 3}\n")
    config = load_meta_config([tmp_path / "a.yaml"], ["OUTER.STEPS", "9", "TASKS.DOMAIN_SHIFT", "False"])
    assert (config.OUTER.STEPS, config.OUTER.LR_PROMPT, config.TASKS.WAYS) == (9, 1.0, 3)
    assert config.TASKS.DOMAIN_SHIFT is False and config.INNER.STEPS == 1
    assert as_dict(config)["OUTER"]["STEPS"] == 9
    with pytest.raises(AttributeError):
        config.SEED = 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("OUTER: {STEP: 7}", "unknown key 'OUTER.STEP'; did you mean 'OUTER.STEPS'?"),
        ("OTHER: 1", "unknown key 'OTHER'"),
        ("OUTER: {STEPS: many}", "OUTER.STEPS: expected int, found 'many'"),
        ("OUTER: [1", "expected YAML"),
        ("just words", "expected keys and values, found str"),
    ],
)
def test_mistakes_in_a_file_name_it(tmp_path, text, says):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(GramError) as error:
        load_meta_config([tmp_path / "bad.yaml"])
    assert says in str(error.value) and "bad.yaml" in str(error.value)


def test_mistakes_in_options(tmp_path):
    with pytest.raises(GramError, match="without a value"):
        load_meta_config([], ["OUTER.STEPS"])
    with pytest.raises(GramError, match="did you mean 'INNER.ALPHA'"):
        load_meta_config([], ["INNER.ALFA", "1"])
    with pytest.raises(GramError, match="none.yaml: expected a YAML file"):
        load_meta_config([tmp_path / "none.yaml"])


def test_nearest_says_nothing_when_nothing_is_near():
    assert did_you_mean("xyz", ["CoOp", "CoOpGRAM"]) == ""
    assert did_you_mean("coopgrm", ["CoOp", "CoOpGRAM"]) == "; did you mean 'CoOpGRAM'?"
