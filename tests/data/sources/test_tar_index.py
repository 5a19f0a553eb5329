"""The index of a shard: what it says of good shards, of bad ones, and what is kept of it."""

import gzip
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from simclr_scale.data.sources import tar_index
from simclr_scale.data.sources.tar_index import Keys, ShardTable, index_shard, scan_shard, split_name
from simclr_scale.errors import InputError
from tests.data.sources.shard_files import encoded, write_labelled, write_shard

EXTENSIONS = Keys()


def labels(shard: Path, image: str | None = None, label: str | None = None) -> list[str]:
    return list(scan_shard(str(shard), Keys(image, label)).labels)


def rows(table: ShardTable) -> list[tuple[str, int, int, str]]:
    return list(zip(table.names, table.offsets.tolist(), table.sizes.tolist(), table.labels, strict=True))


def message(shard: Path, keys: Keys = EXTENSIONS) -> str:
    with pytest.raises(InputError) as caught:
        scan_shard(str(shard), keys)
    assert str(caught.value).startswith(str(shard))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_lead_to_the_bytes_of_every_image(tmp_path: Path, tar_format: int) -> None:
    """Names longer than a plain header holds, and of other alphabets, need headers of their own."""
    long = "d/" * 20 + "n" * 90 if tar_format == tarfile.USTAR_FORMAT else "n" * 200
    names = ["a.png", f"{long}.png", "deep/b.c.png", "ü-Ω.PNG"]
    images = {name: encoded(seed) for seed, name in enumerate(names)}
    shard = write_shard(tmp_path / "a.tar", images, tar_format)
    table = scan_shard(str(shard))
    assert list(table.names) == names
    content = shard.read_bytes()
    for name, offset, size, _ in rows(table):
        assert content[offset : offset + size] == images[name]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.jpg", ("a", "jpg")),
        ("x/y.z/a.seg.PNG", ("x/y.z/a", "seg.png")),
        ("./a.jpg", ("./a", "jpg")),
        ("a", ("a", "")),
        ("x/._a.jpg", ("", "")),
        (".hidden", ("", "")),
    ],
)
def test_names_are_cut_by_the_rule_of_webdataset(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


@pytest.mark.parametrize(
    ("members", "label"),
    [
        ({"cls": "7\n"}, "7"),
        ({"label": "cat"}, "cat"),
        ({"json": '{"label": 3, "cls": 4}'}, "3"),
        ({"json": '{"width": 5, "class": "dog"}'}, "dog"),
        ({"json": "5"}, "5"),
        ({"json": "{broken"}, ""),
        ({"json": '{"label": [1, 2]}'}, ""),
        ({"json": "[" * 100_000}, ""),
        ({"txt": "12"}, "12"),
        ({"txt": "a cat on a mat"}, ""),
        ({"cls": "1", "json": '{"label": 2}', "txt": "3"}, "1"),
        ({"cls": "", "txt": "3"}, "3"),
        ({}, ""),
    ],
)
def test_labels(members: dict[str, str], label: str, tmp_path: Path) -> None:
    named = {f"a.{extension}": text for extension, text in members.items()}
    assert labels(write_shard(tmp_path / "a.tar", {"a.png": encoded(), **named})) == [label]


def test_the_user_says_which_member_is_the_label(tmp_path: Path) -> None:
    members = {"a.png": encoded(), "a.cls": "1", "a.breed.txt": "collie", "a.json": '{"colour": "red"}'}
    shard = write_shard(tmp_path / "a.tar", members)
    assert [labels(shard, label=key) for key in ("cls", ".breed.txt", "colour", "shape", "")] == [
        ["1"],
        ["collie"],
        ["red"],
        [""],
        [""],
    ]


def test_several_images_of_a_sample(tmp_path: Path) -> None:
    members = {"a.png": encoded(1), "a.seg.png": encoded(2), "b.png": encoded(3)}
    shard = write_shard(tmp_path / "a.tar", members)
    assert "sample 'a' has the images png, seg.png; name one by data.image_key" in message(shard)
    assert list(scan_shard(str(shard), Keys("seg.png")).names) == ["a.seg.png"]
    assert list(scan_shard(str(shard), Keys("png")).names) == ["a.png", "b.png"]


def test_members_of_a_sample_may_lie_apart_and_names_may_come_again(tmp_path: Path) -> None:
    members = [("a.png", encoded(1)), ("b.png", encoded(2)), ("a.cls", "1"), ("b.cls", "2"), ("a.png", encoded(3))]
    table = scan_shard(str(write_shard(tmp_path / "a.tar", members)))
    assert [(name, label) for name, _, _, label in rows(table)] == [("a.png", "1"), ("b.png", "2"), ("a.png", "")]


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["BOMB"],)


def test_pickled_members_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    bomb = pickle.dumps(Bomb())
    members = {"a.png": encoded(), **{f"a.{name}": bomb for name in ("pyd", "pkl", "pickle", "pth", "cls.pyd")}}
    shard = write_shard(tmp_path / "a.tar", members)
    assert labels(shard) == [""]
    for key in ("pyd", "pkl", "pickle", "pth", "cls.pyd"):
        assert "pickled members, which are never opened" in message(shard, Keys(label=key))
    assert not (tmp_path / "exploded").exists()


def test_a_label_that_is_none(tmp_path: Path) -> None:
    binary = write_shard(tmp_path / "a.tar", {"a.png": encoded(), "a.cls": b"\xff\xfe\x00"})
    assert "member 'a.cls' is not text" in message(binary)
    large = write_shard(tmp_path / "b.tar", {"a.png": encoded(), "a.json": b" " * ((1 << 20) + 1)})
    assert "too large for a label" in message(large)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_the_place_of_images_are_refused(tmp_path: Path, kind: bytes) -> None:
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        for name in ("note.md", "a.png"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    assert "member 'a.png' is a link or a sparse file" in message(shard)


def test_folders_and_other_files_are_passed_over(tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        folder = tarfile.TarInfo("photos.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in {"photos/a.png": encoded(), "photos/._a.png": b"mac", "README": b"x"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert list(scan_shard(str(shard)).names) == ["photos/a.png"]


def test_a_shard_cut_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    whole = write_labelled(tmp_path / "a.tar", [0, 1, 2]).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        last = tar.getmembers()[-1]
        end = last.offset_data + 512
    # Cut in headers, in images, in labels and between members; beyond `end` only the padding is missing.
    for length in [*range(0, end + 512, 97), *range(0, end + 1, 512)]:
        shard = tmp_path / "cut.tar"
        shard.write_bytes(whole[:length])
        text = message(shard)
        assert "truncated" in text or "not a readable tar" in text, (length, text)
    shard.write_bytes(whole[: end + 512])
    assert len(scan_shard(str(shard)).names) == 3


def test_a_header_that_is_overwritten_is_not_taken_for_the_end(tmp_path: Path) -> None:
    shard = write_labelled(tmp_path / "a.tar", [0, 1, 2])
    with tarfile.open(shard) as tar:
        second = tar.getmembers()[2]
    content = bytearray(shard.read_bytes())
    content[second.offset + 150] ^= 0xFF
    shard.write_bytes(content)
    assert f"damaged at byte {second.offset}" in message(shard)


@pytest.mark.parametrize(("pack", "name"), [(gzip.compress, "gzip"), (lambda data: b"\x28\xb5\x2f\xfd" + data, "zstd")])
def test_compressed_shards_are_refused_in_words(tmp_path: Path, pack: object, name: str) -> None:
    shard = write_labelled(tmp_path / "a.tar", [0])
    shard.write_bytes(pack(shard.read_bytes()))  # type: ignore[operator]
    assert f"is compressed ({name}), which gives no access by an index" in message(shard)


def test_headers_of_random_bytes_end_in_an_error_or_a_table_within_the_shard(tmp_path: Path) -> None:
    """Sizes below 0, pointers backwards and endless chains of headers are what hostile shards are made of."""
    shard = write_shard(tmp_path / "a.tar", {f"{'n' * 120}{n}.png": encoded(n) for n in range(3)}, tarfile.PAX_FORMAT)
    whole = shard.read_bytes()
    rng = np.random.default_rng(0)
    headers = [start for start in range(0, len(whole), 512) if whole[start + 257 : start + 262] == b"ustar"]
    sizes = [b"-0000000001\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"00000000000\0"]
    refused = 0
    for trial in range(300):
        content = bytearray(whole)
        start = int(rng.choice(headers))
        if trial % 2:
            content[start + 124 : start + 136] = sizes[trial // 2 % len(sizes)]
        else:
            for position in rng.integers(0, 512, 3):
                content[start + position] = rng.integers(0, 256)
        total = sum(content[start : start + 512]) - sum(content[start + 148 : start + 156]) + 8 * 32
        content[start + 148 : start + 156] = b"%06o\0 " % total
        shard.write_bytes(content)
        try:
            table = scan_shard(str(shard))
        except InputError:
            refused += 1
        else:
            assert tar_index.images_fit(table.offsets, table.sizes, len(content))
    assert refused > 100


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which shards were scanned."""
    done: list[str] = []
    scan = tar_index.scan_shard

    def counted(path: str, keys: Keys) -> ShardTable:
        done.append(path)
        return scan(path, keys)

    monkeypatch.setattr(tar_index, "scan_shard", counted)
    return done


def test_headers_are_read_once(tmp_path: Path, scans: list[str]) -> None:
    shard = write_labelled(tmp_path / "a.tar", [5, 6])
    first = index_shard(str(shard), Keys())
    assert rows(index_shard(str(shard), Keys())) == rows(first)
    assert scans == [str(shard)]
    index_shard(str(shard), Keys(label=""))
    assert len(scans) == 2, "other members are asked for"


def test_what_was_kept_of_another_state_of_the_shard_is_not_believed(tmp_path: Path, scans: list[str]) -> None:
    shard = write_labelled(tmp_path / "a.tar", [5, 6])
    index_shard(str(shard), Keys())
    status = shard.stat()
    write_labelled(shard, [7, 8])
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert list(index_shard(str(shard), Keys()).labels) == ["7", "8"]
    write_labelled(shard, list(range(30)))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert len(index_shard(str(shard), Keys()).names) == 30
    assert len(scans) == 3


def test_what_was_kept_is_checked(tmp_path: Path, scans: list[str]) -> None:
    shard = write_labelled(tmp_path / "a.tar", [5, 6])
    truth = rows(index_shard(str(shard), Keys()))
    kept = tmp_path / ".simclr_scale" / "a.tar.npz"
    good = kept.read_bytes()
    arrays = dict(np.load(kept))
    lies = [
        {"offsets": arrays["offsets"] + 10**6},
        {"offsets": arrays["offsets"] * 0},
        {"sizes": -arrays["sizes"]},
        {"sizes": arrays["sizes"].astype(float)},
        {"sizes": np.array([np.iinfo(np.int64).max] * 2)},
        {"offsets": arrays["offsets"][:1]},
        {"name_ends": arrays["name_ends"][::-1].copy()},
        {"label_ends": arrays["label_ends"] + 5},
        {"names": np.array([Bomb()], dtype=object)},
    ]
    for number, lie in enumerate(lies, 2):
        np.savez(kept, **{**arrays, **lie})  # type: ignore[arg-type]
        os.environ["BOMB"] = str(tmp_path / "exploded")
        assert rows(index_shard(str(shard), Keys())) == truth, lie
        assert len(scans) == number, lie
    for content in (b"", good[:100], good[:-1], b"PK\x03\x04" + good[8:], os.urandom(500)):
        kept.write_bytes(content)
        assert rows(index_shard(str(shard), Keys())) == truth
    np.savez_compressed(kept, **arrays)
    count = len(scans)
    index_shard(str(shard), Keys())
    assert len(scans) == count + 1, "a small compressed file could hold terabytes of zeros"
    assert kept.read_bytes() == good
    assert not (tmp_path / "exploded").exists()


def test_beside_a_shard_that_may_not_be_written_to_the_users_cache_is_taken(
    tmp_path: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shard = write_labelled(tmp_path / "sets" / "a.tar", [5, 6])
    (shard.parent / ".simclr_scale").write_text("a file, so no folder can be made here")
    for _ in range(2):
        assert list(index_shard(str(shard), Keys()).labels) == ["5", "6"]
    assert len(scans) == 1
    [kept] = (tmp_path / "cache" / "simclr_scale" / "shards").iterdir()
    assert str(tmp_path) not in kept.name
    (tmp_path / "cache").rename(tmp_path / "gone")
    (tmp_path / "cache").write_text("nor here")
    assert list(index_shard(str(shard), Keys()).labels) == ["5", "6"]
    assert len(scans) == 2


def test_the_stamp_holds_all_that_the_table_depends_on(tmp_path: Path) -> None:
    shard = write_labelled(tmp_path / "a.tar", [5])
    index_shard(str(shard), Keys("png", "cls"))
    stamp = json.loads(np.load(tmp_path / ".simclr_scale" / "a.tar.npz")["stamp"].tobytes())
    assert stamp[1:] == [shard.stat().st_size, shard.stat().st_mtime_ns, "png", "cls"]
