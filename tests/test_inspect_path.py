import json

import numpy as np
import pytest

from stages.data.sample import Sample
from stages.data.shards import ShardWriter
from stages.errors import UsageError
from stages.inspect_path import describe


@pytest.fixture
def folder(tmp_path):
    with ShardWriter(
        tmp_path / "set",
        split="val",
        provenance={"from": "a test"},
        field_tokenizers={"image.codes": "0123456789"},
        codebook_sizes={"image.codes": 4096},
    ) as writer:
        for number in range(3):
            fields = {"image": np.zeros((5, 7, 3), np.uint8), "caption": "long " * 200, "image.codes": np.arange(6).reshape(2, 3) + number}
            writer.write(Sample(f"k{number}", {**fields, "caption.ids": np.arange(number), "meta": {"n": number}}))
    return tmp_path / "set"


def test_shards_are_described_in_one_screen(folder):
    data, text = describe(str(folder))
    assert (data["kind"], data["samples"], data["tars"], data["split"]) == ("shards", 3, 1, ["val"])
    assert data["fields"]["image.codes"]["shape"] == [2, 3]
    assert json.loads(json.dumps(data)) == data
    assert len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines())) < 500
    for part in (
        "3 samples in 1 tars",
        "int64    2 x 3  of 4,096 codes  by tokenizer 01234567",
        "uint8    5 x 7 x 3",
        "picture, 7 x 5 pixels",
        '{"from": "a test"}',
    ):
        assert part in text


def test_one_sample_is_shown_whole(folder):
    data, text = describe(str(folder), "k2")
    assert data["fields"] == {
        "caption": "long " * 200,
        "caption.ids": {"dtype": "int64", "shape": [2], "min": 0, "max": 1},
        "image": {"picture": "7 x 5"},
        "image.codes": {"dtype": "int64", "shape": [2, 3], "min": 2, "max": 7},
        "meta": {"n": 2},
    }
    assert "long " * 200 in text
    assert "int64 2 x 3, 2 to 7" in text
    assert "int64 0" in describe(str(folder), "k0").text  # an empty array has no range


def test_a_key_that_is_not_there_is_answered_with_the_nearest(folder):
    with pytest.raises(UsageError, match="no sample has the key 'k9'") as error:
        describe(str(folder), "k9")
    assert "did you mean 'k" in error.value.hint


def test_splits_are_described_one_by_one(tmp_path):
    for split, count in (("val", 1), ("train", 2)):
        with ShardWriter(tmp_path / split, split=split) as writer:
            for number in range(count):
                writer.write(Sample(f"{split}-{number}", {"caption": split}))
    data, text = describe(str(tmp_path))
    assert {split: part["samples"] for split, part in data["splits"].items()} == {"train": 2, "val": 1}
    assert text.startswith("[train]\n")
    assert describe(str(tmp_path), "val-0").data["fields"] == {"caption": "val"}
    with pytest.raises(UsageError):
        describe(str(tmp_path), "test-0")
