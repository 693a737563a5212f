"""A training run: what it learns, writes, says and refuses."""

from __future__ import annotations

import csv
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SMALL, TIMES, description, result_of, run, small, tensors, write_pictures

from maskcore import UserError, data, figures, models, pictures, runfolder, settings, train
from maskcore.checkpoint import State
from maskcore.data import Picture
from maskcore.settings import QUICK, Config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures", 30)


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs, everything written."""
    out = tmp_path_factory.mktemp("runs") / "run"
    flags = [flag for flag in SMALL if flag != "--no-tensorboard"]
    assert run(*flags, "--data", folder, "--out", out, "--epochs", 3, "--keep-best", 2) == 0
    return out


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "available", lambda: False)


def log(folder: Path) -> list[dict[str, float]]:
    with (folder / "log.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


# ---- what it learns


@pytest.mark.usefixtures("no_figures")
def test_learns_twelve_pictures_by_heart(tmp_path: Path) -> None:
    pictures_ = write_pictures(tmp_path / "pictures", 15)
    flags = ("--no-augment", "--lr", 3e-3, "--epochs", 30, "--batch-size", 4, "--val-split", 0.2)
    assert run(*small(pictures_, tmp_path / "run", *flags)) == 0
    rows = log(tmp_path / "run")
    assert max(row["train_accuracy"] for row in rows) == 1.0
    assert min(row["train_cross_entropy"] for row in rows) < 0.05


@pytest.mark.usefixtures("no_figures")
def test_same_seed_same_bits_whatever_the_workers(folder: Path, tmp_path: Path) -> None:
    for name, more in (("a", ("--workers", 0)), ("b", ("--workers", 3, "--cache-gb", 0))):
        assert run(*small(folder, tmp_path / name, "--epochs", 2, *more)) == 0
    assert result_of(tmp_path / "a") == result_of(tmp_path / "b")
    assert run(*small(folder, tmp_path / "c", "--epochs", 2, "--seed", 1)) == 0
    assert result_of(tmp_path / "a") != result_of(tmp_path / "c")


def test_validation_is_in_eval_mode_and_never_augmented(
    folder: Path, monkeypatch: Any, tmp_path: Path
) -> None:
    config = settings.new_config({"data": str(folder), "image_size": 32, "model": "baseline"})
    prepared = pictures.prepare_pictures(config)
    assert prepared.val.augment is None
    assert prepared.train.augment is not None
    first, second = (next(iter(prepared.val.epoch(n))).images for n in (0, 7))
    assert torch.equal(first, second)
    modes = []
    monkeypatch.setattr(figures, "available", lambda: False)
    original = models.for_inference

    def noting(network: models.Network) -> torch.nn.Sequential:
        snapshot = original(network)
        modes.append(any(layer.training for layer in snapshot.modules()))
        return snapshot

    monkeypatch.setattr(models, "for_inference", noting)
    assert run(*small(folder, tmp_path / "run", "--epochs", 1)) == 0
    assert modes == [False]


def test_first_epochs_without_augmentation() -> None:
    config = Config(no_augment_epochs=2)
    assert [train.augmented(config, epoch) for epoch in (1, 2, 3)] == [False, False, True]
    assert not train.augmented(Config(augment=False), 3)


def test_patience_counts_as_keras_does(monkeypatch: Any) -> None:
    class Stub:
        config = Config(patience=2)
        state = State()

    stub: Any = Stub()
    losses = [1.0, 0.8, 0.9, 0.8, 0.7, 0.7, 0.7]  # an equal loss is no improvement
    stalled = []
    for loss in losses:
        stub.state.history.append({"val_loss": loss})
        stalled.append(train.is_stalled(stub))
    assert stalled == [False, False, False, True, False, False, True]


@pytest.mark.usefixtures("no_figures")
def test_early_stopping_ends_the_run(folder: Path, tmp_path: Path, capsys: Any) -> None:
    # A learning rate at which nothing changes: the first epoch stays the best.
    flags = ("--epochs", 9, "--patience", 2, "--lr", 1e-30)
    assert run(*small(folder, tmp_path / "run", *flags)) == 0
    assert len(log(tmp_path / "run")) == 3
    assert "stopped early: 2 epochs without" in capsys.readouterr().out


def test_limit_takes_evenly_from_the_classes() -> None:
    given = [Picture(Path(f"{i}.jpg"), 0 if i < 80 else 1 + i % 2) for i in range(100)]
    taken = pictures.limited(given, 12, seed=3)
    assert [sum(p.label == label for p in taken) for label in (0, 1, 2)] == [4, 4, 4]
    assert taken == pictures.limited(given, 12, seed=3)
    assert taken != pictures.limited(given, 12, seed=4)
    assert pictures.limited(given, None, 0) == pictures.limited(given, 100, 0) == given


# ---- what it writes


def test_run_folder_has_everything(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {
        *("checkpoints", "config.json", "confusion.csv", "confusion.png", "curves.png"),
        *("data.json", "events", "log.csv", "result.json", "skipped.csv", "split.csv"),
    }
    assert list((trained / "events").glob("events.out.tfevents.*"))
    kept = {path.name for path in (trained / "checkpoints").glob("epoch-*")}
    assert len(kept) == 2


def test_log_has_its_columns_and_adds_up(trained: Path) -> None:
    rows = log(trained)
    assert tuple(rows[0]) == runfolder.COLUMNS
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    for row in rows:
        for part in ("train", "val"):
            total = row[f"{part}_cross_entropy"] + row[f"{part}_penalty"]
            assert row[f"{part}_loss"] == pytest.approx(total)
            assert 0 <= row[f"{part}_accuracy"] <= 1
        assert 0 <= row["wait_share"] <= 1
        assert row["wait_seconds"] == pytest.approx(row["wait_share"] * row["train_seconds"])
    assert set(TIMES) < set(rows[0])


@pytest.mark.usefixtures("no_figures")
def test_penalty_is_that_of_the_weights(folder: Path, tmp_path: Path) -> None:
    """The final network's, since the baseline has no regularised layer."""
    flags = ("--model", "final", "--image-size", 128, "--limit-train", 3, "--limit-val", 3)
    assert run(*small(folder, tmp_path / "run", *flags, "--epochs", 1, "--l2", 0.01)) == 0
    (row,) = log(tmp_path / "run")
    weights = tensors(tmp_path / "run/checkpoints/last.safetensors")
    kernels = [weights["network.block4_conv4.weight"], weights["network.dense1.weight"]]
    expected = 0.01 * sum(float(kernel.double().square().sum()) for kernel in kernels)
    assert row["val_penalty"] == pytest.approx(expected, rel=1e-4)
    # Halfway between the penalty before the epoch's only step and behind it.
    assert row["train_penalty"] == pytest.approx(row["val_penalty"], rel=0.01)
    assert row["train_penalty"] != row["val_penalty"]


def test_result_is_the_average_of_the_best_epochs(trained: Path) -> None:
    result = json.loads((trained / "result.json").read_text())
    rows = log(trained)
    mean = sum(row["val_accuracy"] for row in rows) / 3  # all three are among the best ten
    assert result["average_of_best"]["val_accuracy"] == pytest.approx(mean)
    assert result["best"]["val_accuracy"] == max(row["val_accuracy"] for row in rows)


def test_config_repeats_the_run(trained: Path, tmp_path: Path) -> None:
    recorded = json.loads((trained / "config.json").read_text())
    (session,) = recorded["sessions"]
    assert {"torch", "numpy", "pillow", "maskcore", "python"} <= set(session["versions"])
    assert session["machine"]["maskcore"]["instruction set"]
    config = Config.from_dict(recorded["settings"], "config.json")
    assert config.image_size == 32
    assert config.epochs == 3
    toml = tmp_path / "again.toml"
    lines = (f"{key} = {json.dumps(v)}" for key, v in recorded["settings"].items() if v is not None)
    toml.write_text("\n".join(lines))
    assert run("--config", toml, "--out", tmp_path / "again", "--no-tensorboard") == 0
    assert log(tmp_path / "again")[-1]["val_loss"] == log(trained)[-1]["val_loss"]


def test_report_counts_pictures_and_lists_bad_ones(tmp_path: Path, no_figures: None) -> None:
    folder = write_pictures(tmp_path / "pictures", 30)
    (folder / "training" / "10001.jpg").write_bytes(b"")
    (folder / "training" / "10002.jpg").write_text("=not a picture")
    assert run(*small(folder, tmp_path / "run", "--epochs", 1)) == 0
    report = json.loads((tmp_path / "run/data.json").read_text())
    counted = sum(sum(part.values()) for part in report["pictures"].values())
    assert (counted, report["skipped"], report["drawn"]) == (28, 2, False)
    with (tmp_path / "run/skipped.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(Path(row["file"]).name for row in rows) == ["10001.jpg", "10002.jpg"]
    assert all(row["reason"] for row in rows)
    with (tmp_path / "run/split.csv").open(newline="") as file:
        split = list(csv.DictReader(file))
    assert len(split) == 28
    assert {row["set"] for row in split} == {"train", "val"}


def test_a_spreadsheet_runs_nothing_from_a_csv(tmp_path: Path) -> None:
    runfolder.write_csv(tmp_path / "t.csv", ("file", "n"), [("=1+1", -3), ("@x", 2), ("a,b", 1)])
    assert (tmp_path / "t.csv").read_bytes() == b"file,n\n'=1+1,-3\n'@x,2\n\"a,b\",1\n"


def test_drawn_pictures_are_said_to_be_drawn(
    folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, no_figures: None
) -> None:
    asked = []

    def builtin(count: int, *_: Any, **__: Any) -> Path:
        asked.append(count)
        return folder

    monkeypatch.setattr(data, "builtin", builtin)
    monkeypatch.chdir(tmp_path)
    assert run(*SMALL, "--epochs", 1, "--count", 30) == 0
    assert run(*SMALL, "--epochs", 1, "--count", 30) == 0
    assert asked == [30, 30]
    text = capsys.readouterr().out
    assert "drawn by maskcore, not photographs" in text
    assert "drawn by maskcore, not for photographs" in text
    # Without --out no run overwrites another.
    assert sorted(path.name for path in Path("runs").iterdir()) == ["baseline", "baseline-2"]
    # The newest is the one that --resume without a name means.
    assert run("--resume", "--epochs", 2) == 0
    assert [len(log(Path("runs") / name)) for name in ("baseline", "baseline-2")] == [1, 2]


# ---- when it goes wrong


@pytest.mark.usefixtures("no_figures")
def test_loss_that_is_no_number_stops_with_a_good_checkpoint(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    assert run(*small(folder, tmp_path / "run", "--epochs", 4, "--lr", 1e30)) == 1
    error = capsys.readouterr().err
    last = tmp_path / "run/checkpoints/last.safetensors"
    assert error.count("\n") == 1
    assert str(last) in error
    assert "lower --lr" in error
    for name, tensor in tensors(last).items():
        assert torch.isfinite(tensor).all(), name


@pytest.mark.usefixtures("no_figures")
def test_infinite_loss_in_the_middle(folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    original = train.train_step
    steps = 0

    def fifth_is_infinite(*arguments: Any) -> tuple[float, int]:
        nonlocal steps
        steps += 1
        loss, correct = original(*arguments)
        return (float("inf") if steps == 5 else loss), correct

    monkeypatch.setattr(train, "train_step", fifth_is_infinite)
    assert run(*small(folder, tmp_path / "run", "--epochs", 4)) == 1
    assert "loss became inf in epoch 2, batch 2" in capsys.readouterr().err
    state = description(tmp_path / "run/checkpoints/last.safetensors")["state"]
    assert (state["epoch"], state["batch"]) == (2, 0)


BAD: dict[str, tuple[list[str], str]] = {
    "unknown flag": (["--epoch", "3"], "--epoch"),
    "no number": (["--epochs", "many"], "epochs"),
    "zero epochs": (["--epochs", "0"], "epochs must be at least 1"),
    "negative lr": (["--lr", "-1"], "lr must be at least 0"),
    "lr zero": (["--lr", "0"], "lr is 0"),
    "nan": (["--lr", "nan"], "lr must be"),
    "infinite": (["--l2", "inf"], "l2 must be"),
    "cache": (["--cache-gb", "1e300"], "cache-gb must be"),
    "share": (["--val-split", "1.5"], "val-split must be"),
    "batch": (["--batch-size", "0"], "batch-size must be"),
    "model": (["--model", "resnet"], "model"),
    "resize": (["--resize", "crop"], "resize"),
    "device": (["--device", "tpu"], "device"),
    "no folder": (["--data", "nowhere"], "nowhere"),
    "empty name": (["--data", ""], "empty name"),
    "empty folder": (["--data", "empty"], "empty"),
    "a file": (["--data", "a-file"], "a-file"),
    "size too small": (["--model", "final", "--image-size", "64"], "64 is too small"),
    "existing out": (["--out", "full"], "full is not empty"),
    "out is a file": (["--out", "a-file"], "a-file is a file"),
    "no toml": (["--config", "nowhere.toml"], "nowhere.toml"),
    "broken toml": (["--config", "broken.toml"], "broken.toml is not a TOML file"),
    "unknown key": (["--config", "unknown.toml"], "did you mean 'epochs'"),
    "wrong type": (["--config", "type.toml"], "epochs must be an integer"),
    "text for a switch": (["--config", "switch.toml"], "must be true or false"),
    "NUL in a name": (["--config", "nul.toml"], "out must not have a NUL"),
    "binary toml": (["--config", "binary.toml"], "binary.toml is not a TOML file"),
    "resume nothing": (["--resume"], "no run under runs/"),
    "resume no run": (["--resume", "full"], "full is not a run's folder"),
    "resume missing": (["--resume", "nowhere"], "nowhere is not a run's folder"),
    "one class": (["--data", "one-class"], "class"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/file").touch()
    Path("a-file").touch()
    Path("one-class/only").mkdir(parents=True)
    Path("broken.toml").write_text("epochs = = 3")
    Path("unknown.toml").write_text("epoch = 3")
    Path("type.toml").write_text("epochs = 'three'")
    Path("switch.toml").write_text("vertical-flip = 'yes'")
    Path("nul.toml").write_text('out = "a\\u0000b"')
    Path("binary.toml").write_bytes(b"\xff\xfe\x00")
    arguments, expected = BAD[case]
    before = sorted(str(path) for path in Path().rglob("*"))
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("maskcore train: error: ")
    assert captured.err.count("\n") == 1
    assert expected in captured.err
    assert "Traceback" not in captured.err
    assert sorted(str(path) for path in Path().rglob("*")) == before


def test_resume_refuses_other_settings_and_other_pictures(
    trained: Path, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    assert run("--resume", trained, "--lr", 1) == 2
    assert "a resumed run keeps its --lr" in capsys.readouterr().err
    other = write_pictures(tmp_path / "other", 33)
    assert run("--resume", trained, "--data", other, "--epochs", 4) == 2
    assert "not those that" in capsys.readouterr().err
    assert len(log(trained)) == 3


@pytest.mark.usefixtures("no_figures")
def test_pictures_may_have_moved(folder: Path, tmp_path: Path) -> None:
    home = write_pictures(tmp_path / "home", 30)
    assert run(*small(home, tmp_path / "run", "--epochs", 1)) == 0
    home.rename(tmp_path / "moved")
    assert run("--resume", tmp_path / "run", "--data", tmp_path / "moved", "--epochs", 2) == 0


def test_a_run_is_trained_by_one_process_at_a_time(trained: Path) -> None:
    pytest.importorskip("fcntl")
    with (
        runfolder.locked(trained),
        pytest.raises(UserError, match="another process"),
        runfolder.locked(trained),
    ):
        pass


# ---- settings


def given(tmp_path: Path, flags: list[str], toml: str | None = None) -> dict[str, Any]:
    if toml is not None:
        (tmp_path / "s.toml").write_text(toml)
        flags = ["--config", str(tmp_path / "s.toml"), *flags]
    return settings.given_settings(settings.parser().parse_args(flags))


def test_flags_over_toml_over_quick_over_defaults(tmp_path: Path) -> None:
    toml = "epochs = 7\nbatch-size = 5\nquick = true\nhorizontal_flip = false\nrotation = 3"
    config = settings.new_config(given(tmp_path, ["--epochs", "9"], toml))
    assert config.epochs == 9  # flag
    assert config.batch_size == 5  # TOML, with a dash
    assert config.horizontal_flip is False  # TOML, with an underscore
    assert config.rotation == 3.0  # a whole number where a float is meant
    assert config.model == QUICK["model"]  # quick
    assert config.l2 == Config().l2  # default


def test_quick_says_what_it_changes(tmp_path: Path) -> None:
    changes = settings.quick_changes(given(tmp_path, ["--quick", "--epochs", "9"]))
    assert any(text.startswith("model ") and "instead of final" in text for text in changes)
    assert not any(text.startswith("epochs") for text in changes)
    Config.from_dict(QUICK, "QUICK")


def test_every_setting_is_a_flag_with_help(capsys: Any) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    for name in Config().to_dict():
        assert f"--{name.replace('_', '-')}" in text


def test_a_tensorboard_that_cannot_be_imported_costs_its_events_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise TypeError("Descriptors cannot be created directly. Downgrade protobuf")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Broken("torch.utils.tensorboard"))
    events = runfolder.Events(tmp_path, 0)
    events.add({"epoch": 1})
    events.close()
    assert list(tmp_path.iterdir()) == []
    assert "no TensorBoard events" in capsys.readouterr().err
