"""Which files of a folder are pictures of which class, and their split."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskcore import data
from maskcore.errors import UserError


def touch(folder: Path, *names: str) -> None:
    """Files with something in them; find() does not decode."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def labels_of(found: data.PictureSet) -> dict[str, int]:
    return {p.path.relative_to(found.root).as_posix(): p.label for p in found.pictures}


def reasons(found: data.PictureSet) -> dict[str, list[str]]:
    by_name: dict[str, list[str]] = {}
    for skipped in found.skipped:
        by_name.setdefault(skipped.path.name, []).append(skipped.reason)
    return by_name


# ---- the competition's layout


def competition(root: Path, labels: str | dict[str, object]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    text = labels if isinstance(labels, str) else json.dumps(labels)
    (root / "train_gt.json").write_text(text, encoding="utf-8")


def test_json_at_the_root_images_in_training(tmp_path: Path) -> None:
    touch(tmp_path, "training/10002.jpg", "training/10001.jpg", "test/10003.jpg")
    competition(tmp_path, {"10002.jpg": 2, "10001.jpg": 0})
    found = data.find(tmp_path)
    assert (found.layout, found.classes) == ("json", data.CLASSES)
    assert labels_of(found) == {"training/10001.jpg": 0, "training/10002.jpg": 2}
    assert [p.path.name for p in found.pictures] == ["10001.jpg", "10002.jpg"]
    assert found.skipped == []
    assert labels_of(data.find(tmp_path / "training")) == {"10001.jpg": 0, "10002.jpg": 2}


def test_json_beside_the_images(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    competition(tmp_path, {"a.jpg": 1, "b.jpg": 2})
    assert labels_of(data.find(tmp_path)) == {"a.jpg": 1, "b.jpg": 2}


def test_json_of_the_test_part(tmp_path: Path) -> None:
    touch(tmp_path, "test/10003.jpg")
    (tmp_path / "test_gt.json").write_text('{"10003.jpg": 1}')
    assert labels_of(data.find(tmp_path / "test")) == {"10003.jpg": 1}


def test_everything_not_used_is_listed(tmp_path: Path) -> None:
    touch(tmp_path, "training/good.jpg", "training/unlabelled.jpg", "training/wrong.jpg")
    (tmp_path / "training" / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "training" / "pipe.jpg")
    competition(
        tmp_path,
        {"good.jpg": 0, "missing.jpg": 1, "wrong.jpg": 3, "folder.jpg": 1, "pipe.jpg": 1, "b.jpg": -1}
        | {"c.jpg": "1", "d.jpg": True, "e.jpg": 1.0, "f.jpg": None, "g.jpg": [1], "h.jpg": 10**30},
    )
    found = data.find(tmp_path)
    assert labels_of(found) == {"training/good.jpg": 0}
    got = reasons(found)
    assert got["missing.jpg"] == ["is missing"]
    assert got["unlabelled.jpg"] == ["has no label in train_gt.json"]
    assert got["folder.jpg"] == ["is a folder"]
    assert got["pipe.jpg"] == ["is not a regular file"]
    for name in ("wrong.jpg", "b.jpg", "h.jpg"):
        assert "class codes go from 0 to 2" in got[name][0]
    for name in ("c.jpg", "d.jpg", "e.jpg", "f.jpg", "g.jpg"):
        assert "no class code" in got[name][0]
    assert sum(map(len, got.values())) == len(found.skipped) == 12


def test_duplicates(tmp_path: Path) -> None:
    touch(tmp_path, "same.jpg", "differs.jpg", "once.jpg")
    competition(tmp_path, '{"same.jpg": 1, "differs.jpg": 0, "same.jpg": 1, "differs.jpg": 2, "once.jpg": 0}')
    found = data.find(tmp_path)
    assert labels_of(found) == {"same.jpg": 1, "once.jpg": 0}
    assert "the first entry counts" in reasons(found)["same.jpg"][0]
    assert len(reasons(found)["differs.jpg"]) == 2
    assert "different labels" in reasons(found)["differs.jpg"][0]


HOSTILE = ["../secret.jpg", "/etc/passwd", "a/../../secret.jpg", "..", ".", "", "a\\b.jpg", "sub/a.jpg"]
HOSTILE += [
    "nul\0.jpg",
    "line\nbreak.jpg",
    "\x1b[31mred.jpg",
    "half\ud800.jpg",
    "x" * 5000,
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_refused(name: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    touch(root, "good.jpg", "sub/a.jpg")
    touch(tmp_path, "secret.jpg")
    competition(root, json.dumps({name: 0, "good.jpg": 1}))
    found = data.find(root)
    assert labels_of(found) == {"good.jpg": 1}
    assert len(found.skipped) >= 1
    for skipped in found.skipped:
        assert str(skipped.path).isprintable()
        str(skipped.path).encode("utf-8")


def test_links_must_stay_inside(tmp_path: Path) -> None:
    root = tmp_path / "root"
    touch(tmp_path, "secret.jpg", "folder/x.jpg")
    touch(root, "training/good.jpg")
    (root / "training" / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "training" / "in.jpg").symlink_to(root / "training" / "good.jpg")
    (root / "training" / "broken.jpg").symlink_to(root / "nothing")
    (root / "training" / "circle.jpg").symlink_to(root / "training" / "circle.jpg")
    names = ["good.jpg", "out.jpg", "in.jpg", "broken.jpg", "circle.jpg"]
    competition(root, dict.fromkeys(names, 0))
    found = data.find(root)
    assert set(labels_of(found)) == {"training/good.jpg", "training/in.jpg"}
    assert "leaves" in reasons(found)["out.jpg"][0]
    assert "link" in reasons(found)["broken.jpg"][0]
    assert "link" in reasons(found)["circle.jpg"][0]


def test_linked_image_folder_must_stay_inside(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/a.jpg")
    competition(tmp_path / "root", {"a.jpg": 0})
    (tmp_path / "root" / "training").symlink_to(tmp_path / "elsewhere")
    found = data.find(tmp_path / "root")
    assert found.pictures == []
    assert "outside" in reasons(found)["a.jpg"][0]


@pytest.mark.parametrize("text", ["", "[]", "3", "[[1, 2]]", '{"a.jpg": 0', "\xff", "[" * 100_000, "[1]"])
def test_json_that_is_no_label_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "train_gt.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"train_gt\.json"):
        data.find(tmp_path)


# ---- one folder a class


def test_folders_in_sorted_order(tmp_path: Path) -> None:
    touch(tmp_path, "dogs/1.jpg", "cats/2.jpg", "cats/1.jpg")
    found = data.find(tmp_path)
    assert (found.layout, found.classes) == ("folders", ("cats", "dogs"))
    assert labels_of(found) == {"cats/1.jpg": 0, "cats/2.jpg": 0, "dogs/1.jpg": 1}


@pytest.mark.parametrize(
    "names",
    [
        ("nobody", "everybody", "not_all"),
        ("0", "1", "2"),
        ("None", "ALL", "some"),
        ("no-one", "all", "Not all"),
    ],
)
def test_known_folder_names_get_the_competitions_codes(names: tuple[str, ...], tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/p.jpg" for name in names))
    found = data.find(tmp_path)
    assert found.classes == data.CLASSES
    assert labels_of(found) == {f"{name}/p.jpg": code for code, name in enumerate(names)}


def test_known_folder_names_keep_their_codes_when_one_is_missing(tmp_path: Path) -> None:
    touch(tmp_path, "not_all/p.jpg")
    found = data.find(tmp_path)
    assert (found.classes, labels_of(found)) == (data.CLASSES, {"not_all/p.jpg": 2})
    with pytest.raises(UserError, match="no picture can be used of class nobody, everybody"):
        data.require_every_class(found.pictures, found.classes)


@pytest.mark.parametrize("names", [("0", "1", "2", "3"), ("nobody", "0"), ("mask", "no_mask")])
def test_other_folder_names_are_classes_of_their_own(names: tuple[str, ...], tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/p.jpg" for name in names))
    assert data.find(tmp_path).classes == tuple(sorted(names))


def test_folders_list_what_is_no_picture(tmp_path: Path) -> None:
    touch(tmp_path, "cats/1.jpg", "dogs/1.jpg", "dogs/deeper/2.jpg", "notes.txt", "test/3.jpg", ".git/config")
    found = data.find(tmp_path)
    assert set(labels_of(found)) == {"cats/1.jpg", "dogs/1.jpg"}
    assert reasons(found) == {
        "deeper": ["is a folder"],
        "notes.txt": ["is in no class folder"],
        ".git": ["is in no class folder"],
    }


def test_an_empty_class_folder_is_a_class_without_pictures(tmp_path: Path) -> None:
    touch(tmp_path, "cats/1.jpg")
    (tmp_path / "dogs").mkdir()
    found = data.find(tmp_path)
    with pytest.raises(UserError, match="of class dogs"):
        data.require_every_class(found.pictures, found.classes)


def test_class_folder_linked_from_outside(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/1.jpg", "root/cats/1.jpg")
    (tmp_path / "root" / "dogs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="dogs is a link that leaves"):
        data.find(tmp_path / "root")


def test_file_names_that_no_log_could_hold(tmp_path: Path) -> None:
    touch(tmp_path, "cats/1.jpg", "dogs/1.jpg")
    (tmp_path / "dogs" / os.fsdecode(b"bad\xff.jpg")).write_bytes(b"x")
    (tmp_path / "dogs" / "line\nbreak.jpg").write_bytes(b"x")
    found = data.find(tmp_path)
    assert len(found.pictures) == 2
    assert len(found.skipped) == 2
    for skipped in found.skipped:
        str(skipped.path).encode("utf-8")
        assert str(skipped.path).isprintable()


# ---- a table


def table(root: Path, text: str, name: str = "labels.csv") -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(text.encode())


@pytest.mark.parametrize("header", ["file,label", "\ufeffFile, Label", "Id,Category"])
def test_csv_of_codes(header: str, tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "images/b.jpg", "images/c.jpg", "stray.jpg")
    table(
        tmp_path, f"{header}\r\na.jpg,2\r\nimages/b.jpg, 0\r\n\r\nimages/c.jpg,7\r\nlost.jpg,1\r\nshort\r\n"
    )
    found = data.find(tmp_path)
    assert (found.layout, found.classes) == ("csv", data.CLASSES)
    assert labels_of(found) == {"a.jpg": 2, "images/b.jpg": 0}
    got = reasons(found)
    assert set(got) == {"c.jpg", "lost.jpg", "labels.csv", "stray.jpg"}
    assert got["labels.csv"] == ["line 7 has no label"]


def test_csv_of_names(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    table(tmp_path, "label,extra,file\nNot all,1,a.jpg\nnobody,2,b.jpg\n,3,c.jpg\n")
    found = data.find(tmp_path)
    assert (found.classes, labels_of(found)) == (data.CLASSES, {"a.jpg": 2, "b.jpg": 0})
    assert reasons(found)["c.jpg"] == ["has no label"]
    table(tmp_path, "file,label\na.jpg,dog\nb.jpg,cat\nc.jpg,dog\n")
    found = data.find(tmp_path)
    assert (found.classes, labels_of(found)) == (("cat", "dog"), {"a.jpg": 1, "b.jpg": 0, "c.jpg": 1})


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a//b.jpg", "./a.jpg", "link/secret.jpg"])
def test_csv_names_must_lie_below(name: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    touch(tmp_path, "secret.jpg")
    touch(root, "good.jpg", "a/b.jpg", "a.jpg")
    (root / "link").symlink_to(tmp_path)
    table(root, f"file,label\ngood.jpg,1\n{name},0\n")
    found = data.find(root)
    assert labels_of(found) == {"good.jpg": 1}


def test_several_tables(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    table(tmp_path, "file,label\na.jpg,1\n", "one.csv")
    table(tmp_path, "something,else\n1,2\n", "results.csv")
    assert labels_of(data.find(tmp_path)) == {"a.jpg": 1}
    table(tmp_path, "file,label\na.jpg,2\n", "two.csv")
    with pytest.raises(UserError, match=r"one\.csv, two\.csv"):
        data.find(tmp_path)
    table(tmp_path, "file,label\na.jpg,0\n", "labels.csv")
    assert labels_of(data.find(tmp_path)) == {"a.jpg": 0}


# ---- no layout


def test_no_layout(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        data.find(tmp_path / "absent")
    touch(tmp_path, "a.jpg")
    with pytest.raises(UserError, match="is a file"):
        data.find(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="has no pictures in a layout I know"):
        data.find(tmp_path)


def test_the_right_folder_is_suggested(tmp_path: Path) -> None:
    touch(tmp_path, "MaskDataset/training/1.jpg")
    competition(tmp_path / "MaskDataset", {"1.jpg": 0})
    with pytest.raises(UserError, match=r"did you mean .*MaskDataset\?"):
        data.find(tmp_path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(
        st.binary(max_size=60), st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace"))
    )
)
def test_any_label_file_gives_a_set_or_one_sentence(tmp_path: Path, content: bytes) -> None:
    touch(tmp_path, "a.jpg")
    for name, prefix in (
        ("train_gt.json", b""),
        ("train_gt.json", b'{"a.jpg": '),
        ("labels.csv", b"file,label\n"),
    ):
        for old in ("train_gt.json", "labels.csv"):
            (tmp_path / old).unlink(missing_ok=True)
        (tmp_path / name).write_bytes(prefix + content)
        said = ""
        try:
            data.find(tmp_path)
        except UserError as error:
            said = str(error)
        assert said.isprintable()


# ---- split


def pictures(*counts: int) -> list[data.Picture]:
    return [
        data.Picture(Path(f"/x/{label}/{i:03d}.jpg"), label)
        for label, n in enumerate(counts)
        for i in range(n)
    ]


def test_split_is_stratified_and_depends_on_the_seed_alone() -> None:
    everything = pictures(50, 30, 10)
    train, val = data.split(everything, 0.2, seed=3)
    assert Counter(p.label for p in val) == {0: 10, 1: 6, 2: 2}
    assert sorted(train + val, key=str) == sorted(everything, key=str)
    assert data.split(everything, 0.2, seed=3) == (train, val)
    assert data.split(everything, 0.2, seed=4)[1] != val
    shuffled = everything[::-1]
    assert set(data.split(shuffled, 0.2, seed=3)[1]) == set(val)


def test_keras_split_takes_the_first_by_name() -> None:
    everything = pictures(10, 7)
    train, val = data.split(everything[::-1], 0.25, seed=3, method="keras")
    assert [p.path.name for p in val if p.label == 0] == ["001.jpg", "000.jpg"]
    assert [p.path.name for p in val if p.label == 1] == ["000.jpg"]
    assert len(train) == 14


@pytest.mark.parametrize("method", ["stratified", "keras"])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_both_parts_have_every_class(method: str, share: float) -> None:
    train, val = data.split(pictures(2, 3), share, 0, method)
    assert {p.label for p in train} == {p.label for p in val} == {0, 1}


def test_split_refuses() -> None:
    assert data.split(pictures(1), 0, 0) == (pictures(1), [])
    with pytest.raises(UserError, match="class 1 has only one picture"):
        data.split(pictures(3, 1), 0.2, 0)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="validation share"):
            data.split(pictures(3), share, 0)
    with pytest.raises(UserError, match="stratified or keras"):
        data.split(pictures(3), 0.2, 0, "random")


def test_require_every_class() -> None:
    data.require_every_class(pictures(1, 1), ("a", "b"))
    with pytest.raises(UserError, match="fewer than 2 pictures can be used of class b"):
        data.require_every_class(pictures(2, 1), ("a", "b"), at_least=2)
