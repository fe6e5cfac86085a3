"""The kernel cache between threads and processes, killed ones too, and the bound on its size."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from attndsl.runtime import cache as cache_module
from attndsl.runtime.cache import KernelCache, cache_key, encode_entry
from tests.caching import KEY, MEMBERS, Builder, entry, fetched_anew, names, python, start, stored


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def run(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ----------------------------------------------------------------------------- threads and processes


def test_an_exception_leaves_nothing_behind(directory: Path) -> None:
    cache = KernelCache(directory)

    def broken() -> Mapping[str, bytes]:
        raise RuntimeError("no such instruction")

    with pytest.raises(RuntimeError, match="no such instruction"):
        cache.fetch(KEY, broken)
    assert names(directory) == set()
    assert cache._busy == {}
    assert cache.fetch(KEY, Builder()) == MEMBERS


def test_an_interrupted_write_leaves_nothing_behind(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: object, target: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        KernelCache(directory).fetch(KEY, Builder())
    assert names(directory) == set()


def test_what_is_not_bytes_is_refused(directory: Path) -> None:
    with pytest.raises(TypeError, match="names to bytes"):
        KernelCache(directory).fetch(KEY, lambda: {"kernel.py": "text"})  # type: ignore[dict-item]
    assert names(directory) == set()


def test_one_build_among_threads(directory: Path) -> None:
    cache, build = KernelCache(directory), Builder(seconds=0.1)
    results: list[Mapping[str, bytes]] = []
    threads = [threading.Thread(target=lambda: results.append(cache.fetch(KEY, build))) for _ in range(16)]
    run(threads)
    assert build.calls == 1
    assert results == [MEMBERS] * 16
    assert cache._busy == {}


def test_different_keys_build_at_once(directory: Path) -> None:
    cache = KernelCache(directory)
    # Passes only if all four builds are under way together.
    together = threading.Barrier(4, timeout=20)

    def build() -> Mapping[str, bytes]:
        together.wait()
        return MEMBERS

    results: list[object] = []
    run([threading.Thread(target=lambda i=i: results.append(cache.fetch(cache_key(i), build))) for i in range(4)])
    assert results == [MEMBERS] * 4


def test_one_build_among_sixteen_processes(directory: Path, tmp_path: Path) -> None:
    log, gate = tmp_path / "builds", tmp_path / "gate"
    program = f"""
        import os, time
        from pathlib import Path
        from attndsl.runtime.cache import KernelCache
        def build():
            with open({str(log)!r}, "a") as file:
                file.write("built\\n")
            time.sleep(0.3)
            return {{"kernel": b"x" * 300_000}}
        cache = KernelCache(Path({str(directory)!r}))
        print("ready", flush=True)
        while not os.path.exists({str(gate)!r}):
            time.sleep(0.005)
        print(len(cache.fetch({KEY!r}, build)["kernel"]))
    """
    processes = [start(program) for _ in range(16)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    gate.touch()
    outputs = [process.communicate(timeout=60) for process in processes]
    assert outputs == [("300000\n", "")] * 16
    assert log.read_text() == "built\n"
    assert names(directory) == {f"{KEY}.kernel"}


def test_a_killed_builder_blocks_nobody(directory: Path) -> None:
    program = f"""
        import time
        from pathlib import Path
        from attndsl.runtime.cache import KernelCache
        def build():
            print("building", flush=True)
            time.sleep(600)
        KernelCache(Path({str(directory)!r})).fetch({KEY!r}, build)
    """
    process = start(program)
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    process.kill()
    process.communicate()
    assert fetched_anew(directory) == 1
    assert names(directory) == {f"{KEY}.kernel"}


def test_a_stuck_builder_is_not_awaited_for_ever(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_LOCK_TIMEOUT_S", 0.1)
    release, started = threading.Event(), threading.Event()

    def stuck() -> Mapping[str, bytes]:
        started.set()
        assert release.wait(20)
        return MEMBERS

    holder = threading.Thread(target=lambda: KernelCache(directory).fetch(KEY, stuck))
    holder.start()
    assert started.wait(20)
    assert fetched_anew(directory) == 1
    assert fetched_anew(directory) == 0
    release.set()
    holder.join()
    assert names(directory) == {f"{KEY}.kernel"}


def test_a_forked_child_does_not_wait_for_its_parents_threads(directory: Path) -> None:
    program = f"""
        import os, threading, time
        from pathlib import Path
        from attndsl.runtime.cache import KernelCache, cache_key
        cache, started = KernelCache(Path({str(directory)!r})), threading.Event()
        def slow():
            started.set()
            time.sleep(1)
            return {{"from": b"parent"}}
        thread = threading.Thread(target=cache.fetch, args=({KEY!r}, slow))
        thread.start()
        started.wait()
        if os.fork() == 0:
            print(cache.fetch({KEY!r}, lambda: {{"from": b"child"}})["from"].decode(), flush=True)
            os._exit(0)
        thread.join()
        os.wait()
    """
    assert python(program).stdout == "parent\n"


# ----------------------------------------------------------------------------------------- the bound


def test_the_longest_unused_entries_go_first(directory: Path) -> None:
    size = len(encode_entry(KEY, MEMBERS))
    cache = KernelCache(directory, limit=3 * size)
    keys = [cache_key(number) for number in range(4)]
    for age, key in enumerate(keys[:3]):
        cache.fetch(key, Builder())
        os.utime(entry(directory, key), (1000 + age, 1000 + age))
    # Used by a new process, so now the newest.
    KernelCache(directory).fetch(keys[0], Builder())
    cache.fetch(keys[3], Builder())
    assert names(directory) == {f"{key}.kernel" for key in (keys[0], keys[2], keys[3])}
    assert cache.info().bytes <= 3 * size


def test_litter_of_killed_processes_is_swept(directory: Path) -> None:
    stored(directory)
    old, new = time.time() - 2 * cache_module._STALE_AFTER_S, time.time()
    litter = {"old": ("0" * 64, old), "new": ("1" * 64, new)}
    for key, when in litter.values():
        for suffix in (".lock", ".4711.0123456789abcdef.tmp"):
            (directory / (key + suffix)).write_bytes(b"")
            os.utime(directory / (key + suffix), (when, when))
    KernelCache(directory).fetch(cache_key("next"), Builder())
    left = {name for name in names(directory) if not name.endswith(".kernel")}
    assert left == {"1" * 64 + ".lock", "1" * 64 + ".4711.0123456789abcdef.tmp"}


def test_locks_do_not_pile_up(directory: Path) -> None:
    cache = KernelCache(directory)
    for number in range(20):
        cache.fetch(cache_key(number), Builder())
    assert not list(directory.glob("*.lock"))
    assert cache._busy == {}
