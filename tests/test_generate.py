"""Drawn sets: on disk in every layout, in the cache, complete or not there at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from maskcore import data, drawn, generate, scene
from maskcore.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("layout", generate.LAYOUTS)
def test_written_sets_are_found_again(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    arguments = f"--count 9 --test 3 --seed 5 --size 64 --layout {layout}".split()
    assert generate.main([str(folder), *arguments]) == 0
    assert (
        "9 pictures to train on (3 nobody, 3 everybody, 3 not all), 3 to test on" in capsys.readouterr().out
    )
    for part, first, count in ((folder, 0, 9), (folder / "test", 9, 3)):
        found = data.find(part)
        assert (found.layout, found.classes, found.skipped) == (layout, data.CLASSES, [])
        assert len(found.pictures) == count
        by_name = {p.path.name: p for p in found.pictures}
        for index in range(first, first + count):
            content, label = scene.jpeg(5, index, 64)
            picture = by_name[f"{10001 + index}.jpg"]
            assert (picture.label, picture.path.read_bytes()) == (label, content)


def test_the_competitions_names(tmp_path: Path) -> None:
    counts = generate.write_set(tmp_path, 3, test=1, size=64, progress=False)
    assert counts == Counter({0: 1, 1: 1, 2: 1})
    assert set(contents(tmp_path)) == {
        *(f"training/1000{n}.jpg" for n in (1, 2, 3)),
        "test/10004.jpg",
        "train_gt.json",
        "test_gt.json",
    }
    labels = json.loads((tmp_path / "train_gt.json").read_text())
    assert list(labels) == ["10001.jpg", "10002.jpg", "10003.jpg"]
    assert all(type(code) is int for code in labels.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "at least 1 and at most 1000000, not 0"),
        (["--count", "9" * 20], "at most 1000000"),
        (["--count", "3", "--test", "9" * 20], "at most 1000000"),
        (["--count", "3", "--seed", "9" * 20], "below 2^63"),
        (["--count", "3", "--size", "8"], "from 32 to 4096"),
        (["--count", "3", "--seed", "-1"], "at least 0"),
        (["--count", "3", "--test", "-1"], "at least 0"),
        (["--count", "3", "--workers", "0"], "at least 1"),
        (["--count", "many"], "invalid int value"),
        (["--count", "3", "--layout", "zip"], "invalid choice"),
        ([], "--count"),
    ],
)
def test_refuses(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main([str(tmp_path / "new"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("maskcore generate: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_refuses_a_folder_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert generate.main([str(tmp_path), "--count", "3"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert generate.main([str(tmp_path / "mine.txt"), "--count", "3"]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert contents(tmp_path) == {"mine.txt": b"mine"}


@pytest.mark.parametrize("existing", [True, False])
def test_an_interrupted_set_leaves_nothing(
    existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    if existing:
        folder.mkdir()
    drawn_so_far = []

    def interrupted(seed: int, index: int, size: int | None) -> tuple[bytes, int]:
        drawn_so_far.append(index)
        if index == 2:
            raise KeyboardInterrupt
        return b"picture", 0

    monkeypatch.setattr(scene, "jpeg", interrupted)
    assert generate.main([str(folder), "--count", "5"]) == 130
    assert drawn_so_far == [0, 1, 2]
    assert folder.exists() == existing
    assert not existing or list(folder.iterdir()) == []


# ---- the cache


def test_builtin_is_drawn_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = data.builtin(4, seed=2, size=64, cache=tmp_path / "cache", progress=False)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert str(folder) in said
    assert len(data.find(folder).pictures) == 4
    before = contents(folder)
    times = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert data.builtin(4, seed=2, size=64, cache=tmp_path / "cache") == folder
    assert capsys.readouterr().out == ""
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == times
    assert data.builtin(4, seed=3, size=64, cache=tmp_path / "cache") != folder
    assert contents(folder) == before
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    "damage", ["picture gone", "picture cut", "no manifest", "broken manifest", "a file"]
)
def test_a_damaged_set_is_drawn_anew(damage: str, tmp_path: Path) -> None:
    folder = data.builtin(3, size=64, cache=tmp_path, progress=False)
    whole = contents(folder)
    victim = folder / "training" / "10002.jpg"
    if damage == "picture gone":
        victim.unlink()
    elif damage == "picture cut":
        victim.write_bytes(victim.read_bytes()[:50])
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    elif damage == "broken manifest":
        (folder / "manifest.json").write_text("[1]")
    else:
        folder.rename(tmp_path / "elsewhere")
        folder.write_text("in the way")
    assert data.builtin(3, size=64, cache=tmp_path, progress=False) == folder
    assert contents(folder) == whole


def test_builtin_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKCORE_CACHE", str(tmp_path / "here"))
    assert data.builtin(1, size=64, progress=False).parent == tmp_path / "here"
    monkeypatch.delenv("MASKCORE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert data.builtin(1, size=64, progress=False).parent == tmp_path / "home/.cache/maskcore"


def test_an_interrupted_cache_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(scene, "jpeg", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            data.builtin(3, size=64, cache=tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process finishes the same set while this one still draws: its set is kept and used."""
    put = drawn._put_in_place

    def late(made: Path, target: Path, room: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(drawn, "_put_in_place", put)
            drawn.builtin(2, size=64, cache=tmp_path, progress=False)
        kept = target.stat().st_ino
        put(made, target, room)
        assert target.stat().st_ino == kept

    monkeypatch.setattr(drawn, "_put_in_place", late)
    folder = drawn.builtin(2, size=64, cache=tmp_path, progress=False)
    assert len(data.find(folder).pictures) == 2


def test_refuses_numbers_without_sense(tmp_path: Path) -> None:
    for count, seed, size in ((0, 0, 64), (1, -1, 64), (1, 0, 31)):
        with pytest.raises(UserError):
            data.builtin(count, seed, size, cache=tmp_path)


# ---- processes


def test_processes_draw_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = drawn.draw_pictures(tmp_path / "alone", range(20), 1, 64, workers=1, progress=False)
    monkeypatch.setattr(drawn, "_WORTH_PROCESSES", 0)
    monkeypatch.setattr(scene, "jpeg", None)  # whoever draws here, in this process, fails
    together = drawn.draw_pictures(tmp_path / "together", range(20), 1, 64, workers=2, progress=False)
    assert list(together.items()) == list(alone.items())
    assert contents(tmp_path / "alone") == contents(tmp_path / "together")


def test_pictures_are_drawn_without_processes_where_there_can_be_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object, **__: object) -> object:
        raise OSError("no semaphores")

    monkeypatch.setattr(drawn, "_WORTH_PROCESSES", 0)
    monkeypatch.setattr(drawn, "ProcessPoolExecutor", none)
    assert len(drawn.draw_pictures(tmp_path, range(5), 1, 64, workers=2, progress=False)) == 5


def test_a_script_without_a_main_guard_still_gets_its_pictures(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from maskcore import drawn\n"
        "drawn._WORTH_PROCESSES = 0\n"
        f"print('folder', drawn.builtin(3, size=64, cache={str(tmp_path / 'cache')!r}, progress=False))\n"
    )
    root = Path(data.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.split("folder ")[1].strip())
    assert len(data.find(folder).pictures) == 3
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [folder.name]
