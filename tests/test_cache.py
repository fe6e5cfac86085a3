"""The kernel cache: every way in which a disk, another process or another user can spoil it."""

from __future__ import annotations

import os
import resource
import stat
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest

from attndsl.runtime import cache as cache_module
from attndsl.runtime.cache import CacheInfo, CacheWarning, KernelCache, cache_key, decode_entry, encode_entry
from tests.caching import KEY, MEMBERS, Builder, entry, fetched_anew, names, python, stored


@pytest.fixture(autouse=True)
def _one_warning_per_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KernelCache, "_warned", threading.Event())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ------------------------------------------------------------------------------------------- keys


class Colour(Enum):
    RED = 1


@dataclass(frozen=True)
class Node:
    value: object
    span: object = field(default=None, compare=False)


def test_keys_tell_values_apart() -> None:
    values: list[object] = [
        None, True, False, 1, 0, 1.0, 0.0, -0.0, "1", "", b"1", b"", Colour.RED, (), (1,), ((1,),), (1, 1), 10**30,
        frozenset(), frozenset({1}), {}, {1: 2}, {2: 1}, Node(1), Node(1.0), Node(Node(1)), ("ab", "c"), ("a", "bc"),
        ("abc",),
    ]  # fmt: skip
    keys = {cache_key(value) for value in values}
    assert len(keys) == len(values)
    assert all(len(key) == 64 for key in keys)
    assert cache_key("ab", "c") != cache_key("a", "bc")


def test_key_leaves_out_what_does_not_compare() -> None:
    assert cache_key(Node(1, span="here")) == cache_key(Node(1, span="there"))


def test_key_is_the_same_in_every_process() -> None:
    program = (
        "from attndsl.runtime.cache import cache_key; print(cache_key(frozenset('abcdef'), {'x': 1, 'y': 2.5}, ('z',)))"
    )
    expected = cache_key(frozenset("fedcba"), {"y": 2.5, "x": 1}, ("z",))
    for seed in "12":
        assert python(program, PYTHONHASHSEED=seed).stdout.strip() == expected


def test_key_refuses_what_has_no_stable_form() -> None:
    with pytest.raises(TypeError, match="cannot hold object"):
        cache_key(("a", object()))


def test_fetch_refuses_a_key_that_is_not_a_digest(directory: Path) -> None:
    for bad in ("", "../../etc/passwd", KEY.upper(), KEY + "0"):
        with pytest.raises(ValueError, match="not a cache key"):
            KernelCache(directory).fetch(bad, Builder())


# --------------------------------------------------------------------------------- memory and disk


def test_memory_then_disk(directory: Path, no_warning: None) -> None:
    cache, build = KernelCache(directory), Builder()
    first = cache.fetch(KEY, build)
    assert first == MEMBERS
    assert cache.fetch(KEY, build) is first
    assert KernelCache(directory).fetch(KEY, build) == MEMBERS
    assert build.calls == 1


def test_members_cannot_be_changed(directory: Path) -> None:
    members = KernelCache(directory).fetch(KEY, Builder())
    with pytest.raises(TypeError):
        members["kernel.py"] = b"evil"  # type: ignore[index]


def test_only_the_entry_stays_on_disk_and_it_is_private(directory: Path) -> None:
    path = stored(directory)
    assert names(directory) == {path.name}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_directory_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNDSL_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert KernelCache().info() == CacheInfo(tmp_path / "elsewhere", 0, 0)
    monkeypatch.setenv("ATTNDSL_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert KernelCache().info().path.name == "attndsl"


def test_info_and_clear(directory: Path) -> None:
    cache = KernelCache(directory)
    cache.fetch(KEY, Builder())
    cache.fetch(cache_key("backward"), Builder())
    (directory / "notes.txt").write_text("not ours")
    size = sum(path.stat().st_size for path in directory.glob("*.kernel"))
    assert cache.info() == CacheInfo(directory, 2, size)
    assert cache.clear() == CacheInfo(directory, 2, size)
    assert cache.info() == CacheInfo(directory, 0, 0)
    assert names(directory) == {"notes.txt"}
    build = Builder()
    cache.fetch(KEY, build)
    assert build.calls == 1


def test_a_warm_hit_on_disk_is_quick(directory: Path) -> None:
    members = {"kernel.cubin": os.urandom(300_000)}
    KernelCache(directory).fetch(KEY, Builder(members))

    def seconds() -> float:
        cache, build = KernelCache(directory), Builder({})
        start = time.perf_counter()
        assert cache.fetch(KEY, build) == members
        return time.perf_counter() - start

    assert min(seconds() for _ in range(20)) < 3e-3


# -------------------------------------------------------------------------------------- bad entries


def test_every_truncation_is_rebuilt(directory: Path, no_warning: None) -> None:
    path = stored(directory)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        assert fetched_anew(directory) == 1, length
        assert path.read_bytes() == content


def test_every_flipped_byte_is_noticed() -> None:
    content = encode_entry(KEY, MEMBERS)
    assert decode_entry(KEY, content) == MEMBERS
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 0x10
        assert decode_entry(KEY, bytes(flipped)) is None, position
    assert decode_entry(KEY, content + b"\0") is None


def test_a_corrupted_entry_is_rebuilt_and_replaced(directory: Path, no_warning: None) -> None:
    path = stored(directory)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\xff")
    assert fetched_anew(directory) == 1
    assert path.read_bytes() == content
    assert fetched_anew(directory) == 0


def test_another_version_is_rebuilt(directory: Path, monkeypatch: pytest.MonkeyPatch, no_warning: None) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "_VERSION", cache_module._VERSION + 1)
        stored(directory)
    assert fetched_anew(directory) == 1
    assert fetched_anew(directory) == 0


def test_an_entry_of_another_key_is_rebuilt(directory: Path, no_warning: None) -> None:
    other = cache_key("other")
    KernelCache(directory).fetch(other, Builder({"kernel.py": b"wrong"}))
    entry(directory, other).rename(entry(directory))
    assert fetched_anew(directory) == 1


@pytest.mark.parametrize(
    "payload",
    [b"", b"\x01\0\0\0", b"\x01\0\0\0" + b"\xff" * 12, b"\0\0\0\0more", b"\x01\0\0\0\x01" + bytes(11) + b"\xff"],
)
def test_a_malformed_payload_with_a_good_checksum_is_no_entry(payload: bytes) -> None:
    digest = cache_module._digest(KEY, payload)
    header = cache_module._HEADER.pack(cache_module._MAGIC, cache_module._VERSION, digest, len(payload))
    assert decode_entry(KEY, header + payload) is None


def test_a_huge_entry_is_not_read(directory: Path, no_warning: None) -> None:
    path = stored(directory)
    os.truncate(path, 2**40)  # sparse: reading it would need a terabyte of memory
    assert fetched_anew(directory) == 1


# ------------------------------------------------------------------------------------------ distrust


def refused(directory: Path, reason: str) -> None:
    """Fetching works, from memory only, with one warning; what is on disk stays unread."""
    cache, build = KernelCache(directory), Builder({"fresh": b"built"})
    with pytest.warns(CacheWarning, match=reason) as caught:
        for _ in range(3):
            assert cache.fetch(KEY, build) == {"fresh": b"built"}
        cache.fetch(cache_key("another"), Builder())
        KernelCache(directory).fetch(KEY, Builder())
    assert len(caught) == 1
    assert build.calls == 1


def test_a_linked_entry_is_refused(directory: Path, tmp_path: Path) -> None:
    path = stored(directory)
    path.rename(tmp_path / "planted")
    path.symlink_to(tmp_path / "planted")
    refused(directory, "is a symbolic link")
    assert path.is_symlink()


def test_an_entry_that_others_may_write_is_refused(directory: Path) -> None:
    path = stored(directory)
    path.chmod(0o620)
    refused(directory, "writable by other users")
    path.chmod(0o602)
    KernelCache._warned.clear()
    refused(directory, "writable by other users")


def test_an_entry_that_is_no_file_is_refused(directory: Path) -> None:
    path = stored(directory)
    path.unlink()
    os.mkfifo(path)
    refused(directory, "not a plain file")
    path.unlink()
    path.mkdir()
    KernelCache._warned.clear()
    refused(directory, "not a plain file")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_an_entry_of_another_user_is_refused(directory: Path) -> None:
    os.chown(stored(directory), 54321, -1)
    refused(directory, "kernel belongs to another user")


def test_a_directory_of_another_user_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(directory)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    refused(directory, "cache belongs to another user")
    assert KernelCache(directory).info().entries == 0


def test_a_directory_that_others_may_write_is_refused(directory: Path) -> None:
    stored(directory)
    directory.chmod(0o770)
    refused(directory, "cache is writable by other users")


def test_a_linked_directory_is_refused_and_not_cleared(directory: Path, tmp_path: Path) -> None:
    path = stored(directory)
    link = tmp_path / "link"
    link.symlink_to(directory)
    refused(link, "link is a symbolic link")
    assert KernelCache(link).clear().entries == 0
    assert path.exists()


# -------------------------------------------------------------------------------- a disk that fails


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    refused(tmp_path / "file" / "cache", "kept in memory only")


def test_a_read_only_disk_still_serves(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(directory)
    real_open = os.open

    def read_only(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(30, "Read-only file system")
        return real_open(path, flags, mode)

    def no_times(path: str) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(os, "utime", no_times)
    assert fetched_anew(directory) == 0
    with pytest.warns(CacheWarning, match="Read-only file system"):
        assert KernelCache(directory).fetch(cache_key("new"), Builder()) == MEMBERS


def test_a_full_disk(directory: Path) -> None:
    # A file size limit is a real failure in the middle of a write.
    program = f"""
        import resource, signal, warnings
        from pathlib import Path
        from attndsl.runtime.cache import KernelCache, cache_key
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, {resource.RLIM_INFINITY}))
        cache, big = KernelCache(Path({str(directory)!r})), {{"big": bytes(300_000)}}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for name in "abc":
                assert cache.fetch(cache_key(name), lambda: big) == big
        print(len(caught), caught[0].message)
    """
    said = python(program).stdout
    assert said.startswith("1 compiled kernels are kept in memory only")
    assert "File too large" in said
    assert names(directory) == set()
