"""The cache of compiled kernels: in memory, then on disk, shared by every process of one user.

What lies on disk is code that will be run, so nothing there is believed: an entry counts only if its checksum holds,
and only if it and its directory are this user's and nobody else may write them. A bad entry is built anew, and a disk
that cannot be used costs one warning, never a call.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
import stat
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

_ENTRY_SUFFIX = ".kernel"
_LOCK_SUFFIX = ".lock"
_TEMP_SUFFIX = ".tmp"
_KEY = re.compile(r"[0-9a-f]{64}")
_DEFAULT_LIMIT = 2 * 10**9
# Past this a lock's holder is taken for stuck, and the kernel is built beside it: twice the work, the same result.
_LOCK_TIMEOUT_S = 900.0
# What a killed process left behind is removed once it is this old.
_STALE_AFTER_S = 3600.0
# Absent outside POSIX. O_NONBLOCK: opening a named pipe must not wait for its writer.
_OPEN_SAFELY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

if TYPE_CHECKING:
    import filelock


class CacheWarning(UserWarning):
    """The kernel cache on disk is not used, or not fully. Given at most once in a process."""


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """What lies in a cache directory: the number of entries, and their size in bytes."""

    path: Path
    entries: int
    bytes: int


class _RefusedError(Exception):
    """Something on disk is not to be trusted; the text says what and why."""


# ------------------------------------------------------------------------------------------- keys


def cache_key(*parts: object) -> str:
    """Digest of everything that a kernel depends on, the same in every process.

    >>> cache_key("forward", 128, (64, True)) == cache_key("forward", 128, (64, True))
    True
    >>> cache_key("ab", "c") == cache_key("a", "bc")
    False

    parts: None, bool, int, float, str, bytes, enum members, and tuples, lists, sets, mappings and dataclasses of them.
        Dataclass fields with `compare=False` (source spans) do not count.

    Returns 64 hexadecimal digits. Raises TypeError for anything else: its `repr` may differ between processes.
    """
    return hashlib.sha256(_canonical(parts)).hexdigest()


def _canonical(value: object) -> bytes:
    """Bytes that are equal exactly for equal values of the same type."""
    match value:
        case None:
            return b"N"
        case Enum():
            return _tagged(b"E", type(value).__qualname__.encode(), value.name.encode())
        case bool():
            return b"T" if value else b"F"
        case int():
            return _tagged(b"i", str(value).encode())
        case float():
            return _tagged(b"f", struct.pack("<d", value))
        case str():
            return _tagged(b"s", value.encode("utf-8", "surrogatepass"))
        case bytes():
            return _tagged(b"b", value)
        case tuple() | list():
            return _tagged(b"t", *map(_canonical, value))
        case set() | frozenset():
            # Set order differs between processes, as string hashes do.
            return _tagged(b"u", *sorted(map(_canonical, value)))
        case Mapping():
            return _tagged(b"m", *sorted(_tagged(b"p", _canonical(k), _canonical(v)) for k, v in value.items()))
        case _ if is_dataclass(value) and not isinstance(value, type):
            name = f"{type(value).__module__}.{type(value).__qualname__}".encode()
            return _tagged(b"d", name, *(_canonical(getattr(value, f.name)) for f in fields(value) if f.compare))
        case _:
            raise TypeError(f"a cache key cannot hold {type(value).__qualname__}")


def _tagged(tag: bytes, *chunks: bytes) -> bytes:
    # Every length is written, so no two lists of chunks read the same.
    return tag + struct.pack("<I", len(chunks)) + b"".join(struct.pack("<Q", len(c)) + c for c in chunks)


# ---------------------------------------------------------------------------------------- entries

# entry   ::= magic version digest(key, payload) length(payload) payload
# payload ::= count { length(name) length(data) name data }
_MAGIC = b"ATTNDSL\n"
_VERSION = 1
_HEADER = struct.Struct("<8sI32sQ")
_COUNT = struct.Struct("<I")
_LENGTHS = struct.Struct("<IQ")


def encode_entry(key: str, members: Mapping[str, bytes]) -> bytes:
    """The file of an entry."""
    chunks = [_COUNT.pack(len(members))]
    for name, data in members.items():
        encoded = name.encode()
        chunks += [_LENGTHS.pack(len(encoded), len(data)), encoded, data]
    payload = b"".join(chunks)
    return _HEADER.pack(_MAGIC, _VERSION, _digest(key, payload), len(payload)) + payload


def decode_entry(key: str, content: bytes) -> dict[str, bytes] | None:
    """Members of the entry that `encode_entry` made for this key; None for anything else."""
    if len(content) < _HEADER.size:
        return None
    magic, version, digest, length = _HEADER.unpack_from(content)
    payload = memoryview(content)[_HEADER.size :]
    if (magic, version, length) != (_MAGIC, _VERSION, len(payload)) or digest != _digest(key, payload):
        return None
    members: dict[str, bytes] = {}
    try:
        (count,) = _COUNT.unpack_from(payload)
        at = _COUNT.size
        for _ in range(count):
            name_length, data_length = _LENGTHS.unpack_from(payload, at)
            name_end = at + _LENGTHS.size + name_length
            name = str(payload[at + _LENGTHS.size : name_end], "utf-8")
            at = name_end + data_length
            members[name] = bytes(payload[name_end:at])
    except (struct.error, UnicodeDecodeError):
        return None
    return members if at == len(payload) else None


def _digest(key: str, payload: bytes | memoryview) -> bytes:
    # With the key inside, a file renamed to another key is no entry.
    digest = hashlib.sha256(key.encode())
    digest.update(payload)
    return digest.digest()


# ------------------------------------------------------------------------------------------ cache


class KernelCache:
    """Kernels by key, in memory and on disk.

    >>> import tempfile
    >>> cache = KernelCache(Path(tempfile.mkdtemp()) / "kernels")
    >>> cache.fetch(cache_key("forward"), lambda: {"kernel.py": b"pass"})["kernel.py"]
    b'pass'
    >>> cache.info().entries
    1

    directory: where entries lie; made with mode 0700 when first needed. Default: ATTNDSL_CACHE_DIR, else the user's
        cache directory.
    limit: bytes on disk, past which the entries longest unused are removed.

    In memory nothing is dropped: a process holds the kernels that it compiled or loaded.
    """

    _warned: ClassVar[threading.Event] = threading.Event()

    def __init__(self, directory: Path | None = None, *, limit: int = _DEFAULT_LIMIT) -> None:
        chosen = directory or os.environ.get("ATTNDSL_CACHE_DIR")
        if not chosen:
            from platformdirs import user_cache_dir

            chosen = user_cache_dir("attndsl")
        self._directory = Path(chosen).expanduser().absolute()
        self._limit = limit
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._memory: dict[str, Mapping[str, bytes]] = {}
        self._guard = threading.Lock()
        # Lock of each key being fetched, and how many threads hold or await it.
        self._busy: dict[str, tuple[threading.RLock, int]] = {}

    def fetch(self, key: str, build: Callable[[], Mapping[str, bytes]]) -> Mapping[str, bytes]:
        """Members of the entry `key`, from memory, from disk, or from `build`.

        key: a `cache_key`.
        build: makes the members; called by one thread of one process at a time for a key. Others wait for it, those
            with other keys do not. What it raises is raised here, and nothing is kept.

        Raises ValueError for a key that is not one, TypeError if `build` returns something else than names and bytes.
        """
        if not _KEY.fullmatch(key):
            raise ValueError(f"not a cache key: {key!r}")
        if self._pid != os.getpid():
            # Forked: threads that held the locks do not exist here.
            self._start()
        if (members := self._memory.get(key)) is not None:
            return members
        with self._alone(key):
            if (members := self._memory.get(key)) is None:
                members = MappingProxyType(self._fetch_from_disk(key, build))
                self._memory[key] = members
            return members

    def exists(self) -> bool:
        """Whether anything was ever kept on disk, as far as may be looked."""
        # A path's own test raises where a folder may not be looked into.
        return os.path.isdir(self._directory)

    def find(self, key: str) -> Mapping[str, bytes] | None:
        """Members of the entry `key`, from memory or from disk, None where there is none."""
        if (members := self._memory.get(key)) is None and (members := self._read_quietly(key)) is not None:
            self._memory[key] = members
        return members

    def info(self) -> CacheInfo:
        """What lies on disk. A directory that is missing or refused (with a warning) holds nothing."""
        entries = self._entries()
        return CacheInfo(self._directory, len(entries), sum(size for _, size, _ in entries))

    def clear(self) -> CacheInfo:
        """Remove every entry, from memory too. Returns what was removed from disk."""
        self._memory.clear()
        removed = [size for _, size, path in self._entries() if _removed(path)]
        self._sweep()
        return CacheInfo(self._directory, len(removed), sum(removed))

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        with self._guard:
            lock, users = self._busy.get(key, (threading.RLock(), 0))
            self._busy[key] = lock, users + 1
        try:
            with lock:
                yield
        finally:
            with self._guard:
                lock, users = self._busy.pop(key)
                if users > 1:
                    self._busy[key] = lock, users - 1

    def _fetch_from_disk(self, key: str, build: Callable[[], Mapping[str, bytes]]) -> dict[str, bytes]:
        try:
            if (members := self._read(key)) is not None:
                return members
            # A start that builds nothing locks nothing, and is spared the import.
            import filelock

            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_unless_private(self._directory, os.lstat(self._directory), stat.S_ISDIR)
            lock = filelock.FileLock(self._lock_path(key), timeout=_LOCK_TIMEOUT_S, mode=0o600)
            locked = _acquired(lock)
        except (OSError, NotImplementedError, _RefusedError) as reason:
            self._warn(reason)
            return _checked(build())
        try:
            # Who held the lock before may have built it.
            if locked and (members := self._read_quietly(key)) is not None:
                return members
            members = _checked(build())
            try:
                self._write(key, members)
            except OSError as reason:
                self._warn(reason)
            return members
        finally:
            if locked:
                # Removed while held, so locks do not pile up. Who waits on the removed file looks again or, if
                # nothing was published, at worst builds a second time.
                with suppress(OSError):
                    os.unlink(self._lock_path(key))
                lock.release()

    def _read_quietly(self, key: str) -> dict[str, bytes] | None:
        try:
            return self._read(key)
        except _RefusedError:
            # Turned bad since the first look. Writing replaces the name, and never follows it.
            return None

    def _read(self, key: str) -> dict[str, bytes] | None:
        """Members of an entry on disk, None if it must be built. Raises _RefusedError."""
        path = self._entry_path(key)
        try:
            _refuse_unless_private(self._directory, os.lstat(self._directory), stat.S_ISDIR)
            # Looked at first for the message; a link put there since then makes the open fail.
            _refuse_unless_private(path, os.lstat(path), stat.S_ISREG)
            descriptor = os.open(path, os.O_RDONLY | _OPEN_SAFELY)
        except OSError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            try:
                status = os.fstat(descriptor)
                _refuse_unless_private(path, status, stat.S_ISREG)
                if status.st_size > self._limit:
                    return None
                members = decode_entry(key, file.read(status.st_size))
            except OSError:
                return None
        if members is not None:
            # Its time says when it was last used. A read-only directory serves all the same.
            with suppress(OSError):
                os.utime(path)
        return members

    def _write(self, key: str, members: Mapping[str, bytes]) -> None:
        temporary = self._directory / f"{key}.{os.getpid()}.{secrets.token_hex(8)}{_TEMP_SUFFIX}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN_SAFELY, 0o600)
        try:
            # Not synchronised: what a power failure truncates fails its checksum and is built again.
            with os.fdopen(descriptor, "wb") as file:
                file.write(encode_entry(key, members))
            os.replace(temporary, self._entry_path(key))
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        self._evict()

    def _evict(self) -> None:
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= self._limit:
                break
            # Another process may have removed it already: then too it takes no room.
            _removed(path)
            total -= size
        self._sweep()

    def _sweep(self) -> None:
        """Remove what killed processes left: temporary files, and locks that nobody holds."""
        import filelock

        for used, _, path in self._files(_TEMP_SUFFIX, _LOCK_SUFFIX):
            if time.time() - used <= _STALE_AFTER_S:
                continue
            if path.suffix == _TEMP_SUFFIX:
                _removed(path)
                continue
            lock = filelock.FileLock(path, timeout=0, mode=0o600)
            with suppress(OSError, filelock.Timeout), lock:
                _removed(path)

    def _entries(self) -> list[tuple[float, int, Path]]:
        return self._files(_ENTRY_SUFFIX)

    def _files(self, *suffixes: str) -> list[tuple[float, int, Path]]:
        """Time of last use, size and path of each file of ours with one of these suffixes."""
        found: list[tuple[float, int, Path]] = []
        try:
            _refuse_unless_private(self._directory, os.lstat(self._directory), stat.S_ISDIR)
            with os.scandir(self._directory) as listing:
                for item in listing:
                    if _KEY.match(item.name) and item.name.endswith(suffixes):
                        # One removed meanwhile is not there.
                        with suppress(FileNotFoundError):
                            status = item.stat(follow_symlinks=False)
                            found.append((status.st_mtime, status.st_size, Path(item.path)))
        except FileNotFoundError:
            return []
        except (OSError, _RefusedError) as reason:
            self._warn(reason)
        return found

    def _entry_path(self, key: str) -> Path:
        return self._directory / (key + _ENTRY_SUFFIX)

    def _lock_path(self, key: str) -> Path:
        return self._directory / (key + _LOCK_SUFFIX)

    def _warn(self, reason: Exception) -> None:
        if not KernelCache._warned.is_set():
            KernelCache._warned.set()
            message = f"compiled kernels are kept in memory only, not in {self._directory}: {reason}"
            warnings.warn(message, CacheWarning, stacklevel=4)


@functools.cache
def shared_cache() -> KernelCache:
    """The process's kernel cache."""
    return KernelCache()


def _refuse_unless_private(path: Path, status: os.stat_result, is_kind: Callable[[int], bool]) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise _RefusedError(f"{path} is a symbolic link")
    if not is_kind(status.st_mode):
        raise _RefusedError(f"{path} is not a plain file or directory")
    # Elsewhere the user's cache directory has an access list of its own.
    if os.name == "posix":
        if status.st_uid != os.geteuid():
            raise _RefusedError(f"{path} belongs to another user")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _RefusedError(f"{path} is writable by other users")


def _acquired(lock: filelock.BaseFileLock) -> bool:
    from filelock import Timeout

    try:
        lock.acquire()
    except Timeout:
        return False
    return True


def _checked(members: Mapping[str, bytes]) -> dict[str, bytes]:
    for name, data in members.items():
        if type(name) is not str or type(data) is not bytes:
            raise TypeError(f"a cache entry maps names to bytes, not {name!r} to {type(data).__qualname__}")
    return dict(members)


def _removed(path: Path) -> bool:
    try:
        os.unlink(path)
    except OSError:
        return False
    return True
