import json
import shutil

import numpy as np
import pytest
import wids

from stages.data.index import INDEX, META
from stages.data.sample import Sample, encode_field
from stages.data.shards import ShardWriter, open_shards
from stages.data.tar_format import END_OF_ARCHIVE, member_bytes
from stages.verify import verify


def tar_of(*samples: Sample) -> bytes:
    members = []
    for sample in samples:
        for suffix, data in (encode_field(name, value) for name, value in sample.fields.items()):
            members.append(member_bytes(f"{sample.key}.{suffix}", data))
    return b"".join(members) + END_OF_ARCHIVE


def kinds(spec: object) -> list[str]:
    return [finding.kind for finding in verify(str(spec)).findings]


def test_what_was_written_is_all_well(tmp_path, write_set):
    folder = write_set(tmp_path, 25, codebook_sizes={"image.codes": 25})
    result = verify(str(folder))
    assert result.ok
    assert (result.samples, result.tars) == (25, 3)
    assert result.bytes == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert result.text().endswith("all well")
    assert json.loads(json.dumps(result.to_dict()))["ok"] is True


def test_every_split_of_a_parent_is_verified(tmp_path, write_set):
    write_set(tmp_path / "train", 12)
    write_set(tmp_path / "val", 3)
    assert (verify(str(tmp_path)).samples, verify(str(tmp_path)).tars) == (15, 3)


def test_a_single_changed_byte_is_found_wherever_it_is(tmp_path, write_set):
    folder = write_set(tmp_path, 2)
    tar = folder / "data-000000.tar"
    whole = tar.read_bytes()
    for at in range(7, len(whole), 311):
        tar.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        findings = verify(str(folder)).findings
        assert "sha256" in [finding.kind for finding in findings]
        assert {finding.path for finding in findings} <= {str(tar), str(folder / META / INDEX)}


def test_a_cut_tar_is_damaged_whether_indexed_or_not(tmp_path, write_set):
    folder = write_set(tmp_path, 6)
    tar = folder / "data-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])
    result = verify(str(folder))
    assert {"sha256", "damaged"} <= {finding.kind for finding in result.findings}
    shutil.rmtree(folder / META)
    assert "damaged" in kinds(folder)
    assert verify(str(folder)).samples == 5


@pytest.mark.parametrize(
    ("second", "kind", "words"),
    [
        (Sample("b", {"caption": "b", "x": np.array([1.0, np.inf])}), "non-finite", "1 of 2 numbers"),
        (Sample("b", {"caption": "b"}), "uneven", "has caption; the other samples have caption, x"),
        (Sample("../b", {"caption": "b", "x": np.zeros(2)}), "misplaced", "dots, around a slash"),
    ],
)
def test_a_bad_sample_is_found_with_its_place(tmp_path, second, kind, words):
    first = [Sample(key, {"caption": key, "x": np.zeros(2)}) for key in ("a", "a2")]
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of(*first, second))
    (finding,) = verify(str(path)).findings
    assert finding.kind == kind
    assert words in finding.message
    assert finding.key == second.key
    assert finding.offset >= len(tar_of(*first)) - 1024


def test_damaged_values_are_found(tmp_path):
    members = [("a.jpg", b"\xff\xd8\xff\xe0 no jpeg"), ("b.jpg", b"GIF89a")]
    (tmp_path / "x.tar").write_bytes(b"".join(member_bytes(*member) for member in members) + END_OF_ARCHIVE)
    result = verify(str(tmp_path))
    assert [(finding.kind, finding.offset) for finding in result.findings] == [("undecodable", 512), ("undecodable", 1536)]
    assert result.samples == 0


def test_codes_outside_their_codebook_are_found(tmp_path):
    with ShardWriter(tmp_path, codebook_sizes={"image.codes": 8}) as writer:
        for number in (0, 7, 8):
            writer.write(Sample(f"k{number}", {"image.codes": np.full((2, 3), number)}))
    (finding,) = verify(str(tmp_path)).findings
    assert (finding.kind, finding.key) == ("code-range", "k8")
    assert "the codebook has 8" in finding.message


def test_a_key_in_two_tars_is_found(tmp_path):
    for name in ("x.tar", "y.tar"):
        (tmp_path / name).write_bytes(tar_of(Sample("same", {"caption": name})))
    assert kinds(tmp_path) == ["repeated-key"]


def test_missing_unlisted_and_unfinished_sets_are_findings(tmp_path, write_set):
    folder = write_set(tmp_path / "set", 25)
    (folder / "data-000001.tar").rename(folder / "other.tar")
    messages = [(finding.kind, finding.path.rpartition("/")[2]) for finding in verify(str(folder)).findings]
    assert messages == [("index", "data-000001.tar"), ("index", "other.tar")]
    assert kinds(tmp_path / "nothing") == ["unreadable"]
    (tmp_path / "empty").mkdir()
    assert kinds(tmp_path / "empty") == ["unreadable"]


def test_an_index_that_lies_about_a_field_is_found(tmp_path, write_set):
    folder = write_set(tmp_path, 3)
    index = json.loads((folder / META / INDEX).read_text())
    index["fields"]["image.codes"]["shape"] = [4, 4]
    (folder / META / INDEX).write_text(json.dumps(index))
    (finding,) = verify(str(folder)).findings
    assert "'image.codes' is listed as int64 [4, 4] .npy, the tars hold int64 [2, 3] .npy" in finding.message


def test_foreign_tars_get_an_index_once_they_are_well(tmp_path):
    for number in range(2):
        (tmp_path / f"x-{number}.tar").write_bytes(
            tar_of(*(Sample(f"{number}-{n}", {"caption": "text", "x": np.zeros(n)}) for n in range(4)))
        )
    result = verify(str(tmp_path), index=True)
    assert result.ok
    assert result.written == [str(tmp_path / META / INDEX)]
    assert len(wids.ShardListDataset(str(tmp_path / META / INDEX))) == 8
    shards = open_shards(str(tmp_path))
    assert shards.fields["x"]["shape"] == [None]
    assert verify(str(tmp_path)).ok
    (tmp_path / "x-1.tar").write_bytes((tmp_path / "x-1.tar").read_bytes()[:-1024])
    again = verify(str(tmp_path), index=True)
    assert [finding.kind for finding in again.findings][-1] == "not-written"
    assert again.written == []


def test_a_new_index_keeps_what_only_the_old_one_knew(tmp_path, write_set):
    folder = write_set(tmp_path, 12, split="val", provenance={"from": "a test"}, field_tokenizers={"image.codes": "ffff"})
    (folder / "data-000001.tar").unlink()
    assert verify(str(folder), index=True).ok
    shards = open_shards(str(folder))
    assert len(shards) == 10
    assert (shards.splits(), shards.provenance, shards.fields["image.codes"]["tokenizer"]) == (["val"], {"from": "a test"}, "ffff")


def test_members_that_are_not_read_are_noted(tmp_path):
    (tmp_path / "x.tar").write_bytes(member_bytes("a.txt", b"x") + member_bytes("a.pyd", b"pickle") + END_OF_ARCHIVE)
    result = verify(str(tmp_path))
    assert result.ok
    assert "note: 1 members end in .pyd, which mmgen does not read (pickled objects are never loaded)" in result.text()


def test_numbers_that_are_not_finite_get_no_index(tmp_path):
    values = [np.ones(3, np.float32) for _ in range(9)]
    values[4][1] = np.nan
    (tmp_path / "x.tar").write_bytes(tar_of(*(Sample(f"{n}", {"x": value}) for n, value in enumerate(values))))
    result = verify(str(tmp_path), index=True)
    assert [finding.kind for finding in result.findings] == ["non-finite", "not-written"]
    assert not (tmp_path / META).exists()
