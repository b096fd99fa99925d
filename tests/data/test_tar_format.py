import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.tar_format import END_OF_ARCHIVE, member_bytes, member_header, walk

names = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=130)


def as_tarfile_writes(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o444
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512)


@given(names, st.binary(max_size=1100))
def test_members_are_byte_for_byte_those_of_tarfile(name, data):
    assert member_bytes(name, data) == as_tarfile_writes(name, data)


@pytest.mark.parametrize("size", [0, 1, 8**11 - 1, 8**11, 10**13])
def test_sizes_beyond_eight_gigabytes_go_to_a_pax_header(size):
    info = tarfile.TarInfo("big.npy")
    info.size, info.mode = size, 0o444
    assert member_header("big.npy", size) == info.tobuf(tarfile.PAX_FORMAT)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["000.jpg", "folder/" * 20 + "000.jpg", "a" * 95 + ".txt", "./x.txt", "key é.txt"])
def test_archives_of_others_are_walked_as_tarfile_reads_them(form, name):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        tar.addfile(tarfile.TarInfo("a folder"))
        for number in range(3):
            info = tarfile.TarInfo(name)
            info.size = 600 * number
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
    data = buffer.getvalue()
    walked = walk(data)
    assert walked.damage is None
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(info.name, info.offset, info.offset_data, info.size) for info in tar]
    assert [tuple(member) for member in walked.members] == expected


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_rejected_with_their_place(kind):
    info = tarfile.TarInfo("k.image.png")
    info.type, info.linkname = kind, "/etc/passwd"
    walked = walk(member_bytes("k.txt", b"x") + info.tobuf() + END_OF_ARCHIVE)
    assert [member.name for member in walked.members] == ["k.txt"]
    ((name, offset, reason),) = walked.rejected
    assert (name, offset) == ("k.image.png", 1024)
    assert "not a regular file" in reason


def test_a_cut_at_any_byte_is_damage():
    whole = b"".join(member_bytes(f"{number:03d}.txt", b"t" * (400 * number)) for number in range(4)) + END_OF_ARCHIVE
    complete = walk(whole)
    assert complete.damage is None
    for length in range(0, len(whole), 64):
        walked = walk(whole[:length])
        assert walked.damage is not None
        assert walked.members == [member for member in complete.members if member.start + member.size <= length][: len(walked.members)]


def test_a_flipped_header_byte_is_damage_and_ends_the_walk():
    whole = bytearray(b"".join(member_bytes(f"{number}.txt", b"text") for number in range(3)) + END_OF_ARCHIVE)
    for at in range(1024, 1536):
        whole[at] ^= 1
        walked = walk(bytes(whole))
        assert walked.damage is not None
        assert walked.damage[0] == 1024
        assert [member.name for member in walked.members] == ["0.txt"]
        whole[at] ^= 1


def test_a_second_archive_behind_the_first_is_damage():
    one = member_bytes("0.txt", b"text") + END_OF_ARCHIVE
    assert walk(one + bytes(5000)).damage is None
    reason = walk(one + one).damage
    assert reason is not None
    assert "after the end" in reason[1]


@given(st.binary(max_size=2000))
def test_any_bytes_are_walked_without_an_exception(data):
    assert walk(data).damage is not None or not any(data)


@given(st.data())
def test_a_walk_never_leaves_the_file(data):
    whole = bytearray(b"".join(member_bytes(name, b"x" * 700) for name in ("a.txt", "é.txt", "b" * 120)) + END_OF_ARCHIVE)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    for member in walk(bytes(whole)).members:
        assert 0 < member.start <= member.start + member.size <= len(whole)


def test_gzip_is_named():
    reason = walk(b"\x1f\x8b" + bytes(1000)).damage
    assert reason is not None
    assert "gunzip" in reason[1]
