"""Archives and folders of strangers: each attack is refused by name, nothing is written, nothing left behind."""

import gzip
import tarfile

import pytest

from fedsft_assets.model.archive.members import DEFAULT_LIMITS, Limits, open_archive, open_tar
from fedsft_assets.model.errors import ModelError
from fedsft_assets_tests.model.megatron_archives import SETTINGS, VOCAB_FILE, members, write_folder, write_tar


@pytest.fixture
def files() -> dict[str, bytes]:
    return {**members(SETTINGS), "model_weights.ckpt": bytes(range(256)) * 400, "model_weights/x": b"inner"}


def _contents(path, scratch, limits=DEFAULT_LIMITS) -> dict[str, bytes]:
    with open_archive(path, scratch, limits) as archive:
        return {name: archive.content(name, 1 << 20) for name in archive.members}


@pytest.mark.parametrize("kind", ["tar", "gzip", "folder"])
def test_files_are_read_in_place_wherever_they_are(files, tmp_path, kind):
    if kind == "folder":
        path = write_folder(tmp_path / "folder", files)
    else:
        path = write_tar(tmp_path / "megatron.nemo", files, mode="w:gz" if kind == "gzip" else "w")
    before = sorted(tmp_path.rglob("*"))
    assert _contents(path, tmp_path / "scratch") == files
    assert [place for place in sorted(tmp_path.rglob("*")) if place.name != "scratch"] == before
    with open_archive(path, tmp_path / "scratch") as archive:
        assert archive.size == sum(map(len, files.values()))
        assert archive.members["model_weights.ckpt"].open(offset=3, size=2).read() == b"\3\4"
        with pytest.raises(ModelError, match=r"model_weights\.ckpt has 102400 bytes, more than 100"):
            archive.content("model_weights.ckpt", 100)
        with pytest.raises(ModelError, match=r"has no missing\.json; not a \.nemo archive"):
            archive.content("missing.json", 100)


def test_archives_that_are_missing_or_compressed_otherwise_are_refused(files, tmp_path):
    with pytest.raises(ModelError, match=r"nowhere\.nemo: no such file or folder"):
        _contents(tmp_path / "nowhere.nemo", tmp_path)
    for magic, name in ((b"BZh9", "bzip2"), (b"\xfd7zXZ", "xz"), (b"PK\3\4", "zip")):
        (tmp_path / "other.nemo").write_bytes(magic + b"\0" * 1000)
        with pytest.raises(ModelError, match=rf"other\.nemo: is a {name} file"):
            _contents(tmp_path / "other.nemo", tmp_path)
    packed = write_tar(tmp_path / "packed.nemo", files, mode="w:gz")
    with (
        pytest.raises(ModelError, match=r"packed\.nemo: is a gzip file; expected an uncompressed tar"),
        open_tar(packed),
    ):
        pass


def _entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.size = kind, link, size
    return entry


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (_entry("../outside", size=4), "is outside of the archive"),
        (_entry("model_weights/../../outside", size=4), "is outside of the archive"),
        (_entry("/tmp/outside", size=4), "is outside of the archive"),
        (_entry("link", tarfile.SYMTYPE, "/etc/passwd"), "is neither a plain file nor a folder"),
        (_entry("link", tarfile.LNKTYPE, "model_config.yaml"), "is neither a plain file nor a folder"),
        (_entry("device", tarfile.CHRTYPE), "is neither a plain file nor a folder"),
        (_entry("device", tarfile.BLKTYPE), "is neither a plain file nor a folder"),
        (_entry("pipe", tarfile.FIFOTYPE), "is neither a plain file nor a folder"),
        (_entry("model_config.yaml", size=4), "occurs twice"),
        (_entry("/".join("abcdefghi")), "is 9 levels deep, more than 8"),
        (_entry("/".join("abcdefgh"), tarfile.DIRTYPE), "is 9 levels deep, more than 8"),
        (_entry("back\\slash", size=4), "is outside of the archive"),
        (_entry(".", size=4), "is outside of the archive"),
    ],
    ids=lambda value: f"{value.name}-{value.type.decode()}" if isinstance(value, tarfile.TarInfo) else "",
)
def test_members_that_are_no_plain_files_inside_are_refused(files, tmp_path, entry, message, mode):
    (tmp_path / "in").mkdir()
    source = write_tar(tmp_path / "in/megatron.nemo", files, (entry,), mode)
    with pytest.raises(ModelError, match=rf"megatron\.nemo: .*{message}"):
        _contents(source, tmp_path / "out")
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} <= {"in", "in/megatron.nemo", "out"}


def test_links_in_a_folder_are_refused(files, tmp_path):
    folder = write_folder(tmp_path / "folder", files)
    (folder / VOCAB_FILE).unlink()
    (folder / VOCAB_FILE).symlink_to("/etc/passwd")
    with pytest.raises(ModelError, match=rf"{VOCAB_FILE}: is neither a plain file nor a folder"):
        _contents(folder, tmp_path)


def test_too_many_members_are_refused(files, tmp_path):
    for kind in (tarfile.REGTYPE, tarfile.DIRTYPE):
        entries = tuple(_entry(f"file{index}", kind) for index in range(100))
        source = write_tar(tmp_path / "megatron.nemo", files, entries)
        with pytest.raises(ModelError, match="more than 50 members"):
            _contents(source, tmp_path, Limits(members=50))
    folder = write_folder(tmp_path / "folder", {f"folder{index}/file": b"" for index in range(30)})
    with pytest.raises(ModelError, match="more than 50 members"):
        _contents(folder, tmp_path, Limits(members=50))


@pytest.mark.parametrize("size", [1 << 40, -1, -1024])
def test_sizes_that_lie_are_refused(files, tmp_path, size):
    source = write_tar(tmp_path / "megatron.nemo", files)
    content = bytearray(source.read_bytes())
    at = content.index(b"./model_weights.ckpt")
    entry = tarfile.TarInfo.frombuf(bytes(content[at : at + 512]), "utf-8", "surrogateescape")
    entry.size = size
    content[at : at + 512] = entry.tobuf(tarfile.GNU_FORMAT)
    source.write_bytes(content)
    with pytest.raises(ModelError, match=r"truncated: './model_weights\.ckpt' extends beyond the end"):
        _contents(source, tmp_path)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_archives_cut_anywhere_are_refused_with_their_name(files, tmp_path, mode):
    content = write_tar(tmp_path / "megatron.nemo", files, mode=mode).read_bytes()
    for share in (0.0, 0.01, 0.3, 0.6, 0.9):
        (tmp_path / "cut.nemo").write_bytes(content[: int(share * len(content))])
        with pytest.raises(ModelError, match=r"cut\.nemo: .*truncated"):
            _contents(tmp_path / "cut.nemo", tmp_path)


def test_a_bomb_of_gzip_is_refused_before_it_fills_the_disk(tmp_path):
    with gzip.open(tmp_path / "bomb.nemo", "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(b"\0" * (1 << 20))
    with pytest.raises(ModelError, match=r"bomb\.nemo: unpacks to more than 20 times its size"):
        _contents(tmp_path / "bomb.nemo", tmp_path, Limits(unpacked_slack=1 << 20))
    assert [path.name for path in tmp_path.iterdir()] == ["bomb.nemo"]
