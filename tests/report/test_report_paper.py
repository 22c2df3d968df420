"""The transcribed numbers against the averages that the paper prints beside them."""

import itertools

import pytest

from gram_meta.report import paper

ROUNDING = 0.005 + 1e-9  # of a number printed with two decimals
OFF = 0.02 + 1e-9  # two of them are off by more, to two decimals: UNIGRAM's New average, and its H on DTD
TABLE_1 = paper.table(1)
TRAINERS = list(paper.TRAINERS)


def harmonic(base, new):
    return 2 * base * new / (base + new)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_eleven_datasets_and_seven_rows():
    assert len(TABLE_1["datasets"]) == 11
    assert all(list(rows) == TRAINERS for rows in TABLE_1["datasets"].values())
    assert list(TABLE_1["average"]) == TRAINERS


@pytest.mark.parametrize("trainer", TRAINERS)
def test_table_1_averages(trainer):
    base, new, h = TABLE_1["average"][trainer]
    rows = [rows[trainer] for rows in TABLE_1["datasets"].values()]
    assert base == pytest.approx(mean(row[0] for row in rows), abs=ROUNDING)
    recomputed = mean(row[1] for row in rows)
    if trainer == "UniGRAM":
        assert round(recomputed, 2) == pytest.approx(new, abs=OFF)
    else:
        assert new == pytest.approx(recomputed, abs=ROUNDING)
    assert h == pytest.approx(harmonic(base, new), abs=ROUNDING)  # not the mean of the datasets' H


@pytest.mark.parametrize(("dataset", "trainer"), list(itertools.product(TABLE_1["datasets"], TRAINERS)))
def test_table_1_harmonic_means(dataset, trainer):
    base, new, h = TABLE_1["datasets"][dataset][trainer]
    if (dataset, trainer) == ("DescribableTextures", "UniGRAM"):
        assert round(harmonic(base, new), 2) == pytest.approx(h, abs=OFF)
    else:
        assert h == pytest.approx(harmonic(base, new), abs=ROUNDING)


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_transfer_averages_are_over_the_targets(number):
    found = paper.table(number)
    assert list(found["rows"]) == [name for name in TRAINERS if name != "ZeroshotCLIP" or number in (2, 4)]
    for row in found["rows"].values():
        assert len(row["targets"]) == len(found["targets"]) and found["source"] not in found["targets"]
        assert row["average"] == pytest.approx(mean(row["targets"]), abs=ROUNDING)


def test_transfer_tables_agree_on_the_source():
    for one, other in ((2, 3), (4, 5)):
        rows = paper.table(one)["rows"]
        for trainer, row in paper.table(other)["rows"].items():
            assert row["source"] == rows[trainer]["source"]
    assert paper.table(2)["targets"] == paper.table(4)["targets"]
    assert paper.table(3)["targets"] == paper.table(5)["targets"] == list(paper.DATASETS[1:])


@pytest.mark.parametrize("number", [6, 7])
def test_ablations(number):
    for row in paper.table(number)["rows"]:
        base, new, h = row["values"]
        assert h == pytest.approx(harmonic(base, new), abs=ROUNDING)
    assert paper.ablation(0) == paper.tokens(4) == paper.base_to_new(paper.DATASETS, "UniGRAM")
    assert [row["row"] for row in paper.table(6)["rows"]] == [0, 1, 2, 3, 4, 5]
    assert [row["tokens"] for row in paper.table(7)["rows"]] == [2, 4, 6, 8]


def test_numbers_quoted_in_the_text():
    """Sec. 4.2 to 4.4 say some differences in words."""
    base, new = ({t: TABLE_1["average"][t][column] for t in TRAINERS} for column in (0, 1))
    assert base["CoOpGRAM"] - base["CoOp"] == pytest.approx(1.16)
    assert base["VPTGRAM"] - base["VPT"] == pytest.approx(1.51)
    assert new["CoOpGRAM"] - new["CoOp"] == pytest.approx(1.82)
    assert new["VPTGRAM"] - new["VPT"] == pytest.approx(1.87)
    for dataset, gain in {"FGVCAircraft": 14.29, "DescribableTextures": 6.38, "EuroSAT": 11.34}.items():
        rows = TABLE_1["datasets"][dataset]
        assert rows["UniGRAM"][1] - rows["CoCoOp"][1] == pytest.approx(gain)
    three = paper.table(3)["rows"]
    assert three["CoOpGRAM"]["average"] - three["CoOp"]["average"] == pytest.approx(1.20)
    assert three["VPTGRAM"]["average"] - three["VPT"]["average"] == pytest.approx(1.08)
    assert three["UniGRAM"]["average"] - three["CoCoOp"]["average"] == pytest.approx(1.97)
    two = paper.table(2)["rows"]
    assert two["UniGRAM"]["targets"][3] - two["CoCoOp"]["targets"][3] == pytest.approx(1.16)


def test_lookup_is_strict():
    assert paper.base_to_new(("EmojiFood",), "CoOp") == {}
    assert paper.base_to_new(paper.DATASETS[:-1], "CoOp") == {}
    assert paper.base_to_new(paper.DATASETS, "JointPrompt") == {}
    assert paper.base_to_new(("DescribableTextures",), "CoOp")["new"] == 55.67
    targets = paper.table(2)["targets"]
    assert paper.transfer(2, "ImageNet", targets, "CoOp")["average"] == 60.03
    assert "average" not in paper.transfer(2, "ImageNet", targets[:3], "CoOp")
    assert paper.transfer(2, "EmojiTravel", targets, "CoOp") == {}
    assert paper.transfer(3, "ImageNet", targets, "ZeroshotCLIP") == {}
    assert paper.tokens(5) == {}
