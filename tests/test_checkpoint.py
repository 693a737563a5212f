"""Checkpoints: whole or not there, refused in one sentence when wrong, and resumed to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import random_kills
from safetensors.torch import save_file
from small_runs import description, result_of, run, small, tensors, write_pictures

from maskcore import UserError, checkpoint, figures, train

pytestmark = pytest.mark.usefixtures("no_figures")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures", 30)


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run(*small(pictures, out, "--epochs", 2, "--lr", 1e-3)) == 0
    return out


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing curves is most of a small run's time, and nothing here looks at them."""
    monkeypatch.setattr(figures, "available", lambda: False)


# ---- killed and resumed


def play(pictures: Path, folder: Path, scenarios: dict[str, list[Any]]) -> dict[str, int]:
    """Plays the scenarios of killed_runs, compares each with a run never killed."""
    script = Path(__file__).with_name("killed_runs.py")
    text = json.dumps([{"name": name, "kills": kills} for name, kills in scenarios.items()])
    done = subprocess.run([sys.executable, script, pictures, folder, text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = result_of(folder / "whole")
    for name in scenarios:
        assert result_of(folder / name) == whole, name
        left = [p.name for p in (folder / name).rglob(".*")]
        assert left == [], f"{name} left half-written files"
    killed: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return killed


@needs_fork
def test_killed_run_ends_with_the_same_bits(pictures: Path, tmp_path: Path) -> None:
    scenarios: dict[str, list[Any]] = {f"random-{seed}": random_kills(seed) for seed in (1, 2, 3)}
    # Saves: the first is that of a new run; the tenth is within the second epoch.
    scenarios |= {
        "before-writing": [["save_file", 3, "before"]],
        "amid-writing": [["save_file", 1, "amid"], ["save_file", 10, "amid"]],
        "written-not-synced": [["save_file", 9, "after"]],
        "synced-not-renamed": [["replace", 12, "before"]],
        "renamed-folder-not-synced": [["replace", 13, "after"], ["replace", 8, "after"]],
    }
    killed = play(pictures, tmp_path, scenarios)
    for name, kills in scenarios.items():
        if not name.startswith("random"):
            assert killed[name] == len(kills)
    assert sum(killed[f"random-{seed}"] for seed in (1, 2, 3)) > 0


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["before", "after"])
def test_killed_at_every_rename(pictures: Path, tmp_path: Path, stage: str) -> None:
    killed = play(pictures, tmp_path, {f"{call}": [["replace", call, stage]] for call in range(1, 36)})
    kills = list(killed.values())
    assert kills == sorted(kills, reverse=True)
    assert sum(kills) >= 25
    assert kills[-1] == 0, "the run renames more files than were tried"


@needs_fork
@pytest.mark.slow
def test_killed_at_many_random_moments(pictures: Path, tmp_path: Path) -> None:
    killed = play(pictures, tmp_path, {f"{seed}": random_kills(seed) for seed in range(100, 160)})
    assert sum(killed.values()) > 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at_step", [1, 4, 6])  # within the first, at the end of it, in the second
def test_signal_saves_and_resumes_to_the_bit(
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    at_step: int,
) -> None:
    assert run(*small(pictures, tmp_path / "whole", "--epochs", 2)) == 0
    steps = 0
    original = train.train_step

    def step_and_signal(*arguments: Any) -> tuple[float, int]:
        nonlocal steps
        steps += 1
        if steps == at_step:
            signal.raise_signal(number)
        return original(*arguments)

    monkeypatch.setattr(train, "train_step", step_and_signal)
    capsys.readouterr()
    stopped = run(*small(pictures, tmp_path / "stopped", "--epochs", 2))
    assert stopped == 128 + number
    # The step in which the signal came was finished, and is in the checkpoint.
    state = description(tmp_path / "stopped/checkpoints/last.safetensors")["state"]
    assert (state["epoch"] - 1) * 3 + state["batch"] == at_step
    assert f"--resume {tmp_path / 'stopped'}" in capsys.readouterr().out
    assert run("--resume", tmp_path / "stopped") == 0
    assert result_of(tmp_path / "stopped") == result_of(tmp_path / "whole")


def test_dropout_goes_on_where_it_was(pictures: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The final network has dropout and BatchNorm, whose state the baseline has not."""
    flags = ["--model", "final", "--image-size", "128", "--limit-train", 6, "--limit-val", 3]
    flags += ["--batch-size", 2, "--epochs", 1]
    assert run(*small(pictures, tmp_path / "whole", *flags)) == 0
    original = train.train_step
    steps = 0

    def step_and_signal(*arguments: Any) -> tuple[float, int]:
        nonlocal steps
        steps += 1
        if steps == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(train, "train_step", step_and_signal)
    assert run(*small(pictures, tmp_path / "stopped", *flags)) == 143
    torch.manual_seed(999)
    torch.rand(10)
    assert run("--resume", tmp_path / "stopped") == 0
    assert result_of(tmp_path / "stopped") == result_of(tmp_path / "whole")


def test_resumed_for_more_epochs_is_the_longer_run(pictures: Path, tmp_path: Path) -> None:
    assert run(*small(pictures, tmp_path / "long", "--epochs", 3)) == 0
    assert run(*small(pictures, tmp_path / "short", "--epochs", 2)) == 0
    assert run("--resume", tmp_path / "short", "--epochs", 3) == 0
    assert result_of(tmp_path / "short") == result_of(tmp_path / "long")


# ---- files


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    checkpoint.write_text(path, "old")

    def fill_the_disk() -> None:
        with checkpoint.replacing(path) as new:
            new.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*file: No space left"):
        fill_the_disk()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="links and pipes are POSIX")
def test_only_files_are_replaced(tmp_path: Path) -> None:
    """Renaming over them would make a file of /dev/null, and of a link."""
    file, link, pipe = (tmp_path / name for name in ("file", "link", "pipe"))
    file.write_text("old")
    link.symlink_to(file)
    checkpoint.write_text(link, "new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    os.mkfifo(pipe)
    for other in (pipe, tmp_path):
        with pytest.raises(UserError, match="no regular file"):
            checkpoint.write_text(other, "new")
    assert pipe.is_fifo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "pipe"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_checkpoints_can_be_read_by_whom_the_log_can(trained: Path) -> None:
    mode = (trained / "log.csv").stat().st_mode
    assert {path.stat().st_mode for path in (trained / "checkpoints").glob("*.safetensors")} == {mode}


def test_run_folder_means_its_best_epoch(trained: Path) -> None:
    history = checkpoint.read_meta(trained / "checkpoints/last.safetensors").state.history
    best = checkpoint.best_of(history)[0]["epoch"]
    assert checkpoint.locate(trained).name == f"epoch-{best:04d}.safetensors"
    assert checkpoint.locate(trained / "checkpoints") == checkpoint.locate(trained)


def test_best_is_accuracy_then_loss_then_first() -> None:
    rows = [(1, 0.5, 1.0), (2, 0.7, 0.9), (3, 0.7, 0.8), (4, 0.7, 0.8), (5, 0.6, 0.1)]
    history = [{"epoch": e, "val_accuracy": a, "val_loss": v} for e, a, v in rows]
    assert [record["epoch"] for record in checkpoint.best_of(history)] == [3, 4, 2, 5, 1]
    assert [record["epoch"] for record in checkpoint.best_of(history, 2)] == [3, 4]


def test_weights_survive_the_round_trip(trained: Path) -> None:
    path = checkpoint.locate(trained)
    network, meta = checkpoint.load_model(path)
    assert not network.training
    assert meta.preprocess.size == network.image_size == 32
    stored = tensors(path)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, stored[f"network.{name}"])


def damaged(path: Path, how: str) -> None:
    """Rewrites a good checkpoint with one thing wrong."""
    content, header = tensors(path), description(path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
        return
    if how == "one bit":
        raw = bytearray(path.read_bytes())
        raw[-2000] ^= 1
        path.write_bytes(raw)
        return
    if how == "empty":
        path.write_bytes(b"")
        return
    if how == "a pickle":
        torch.save({"network": content}, path)
        return
    if how == "no JSON":
        save_file(content, path, metadata={"maskcore": "{"})
        return
    if how == "foreign":
        save_file(content, path)
        return
    name = "network.dense1.weight"
    match how:
        case "future schema":
            header["schema"] = 99
        case "unknown key":
            header["surprise"] = 1
        case "missing key":
            del header["preprocess"]
        case "unknown network":
            header["network"]["name"] = "resnet"
        case "other size":
            header["network"]["image_size"] = header["preprocess"]["size"] = 64
        case "huge":
            header["network"]["image_size"] = header["preprocess"]["size"] = 4000
        case "classes":
            header["classes"] = ["one"]
        case "state":
            header["state"]["epoch"] = -1
        case "unknown preprocessing":
            header["preprocess"]["crop"] = True
        case "not a table":
            header = {"schema": 1}
        case "shape":
            content[name] = content[name][:, :-1].contiguous()
        case "dtype":
            content[name] = content[name].double()
        case "missing tensor":
            del content[name]
        case "unknown tensor":
            content["network.extra"] = torch.zeros(1)
    save_file(content, path, metadata={"maskcore": json.dumps(header)})


DAMAGES = (
    *("truncated", "one bit", "empty", "a pickle", "no JSON", "foreign", "future schema"),
    *("unknown key", "missing key", "unknown network", "other size", "huge", "classes", "state"),
    *("unknown preprocessing", "not a table", "shape", "dtype", "missing tensor", "unknown tensor"),
)


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_checkpoint_is_refused_in_one_sentence(trained: Path, tmp_path: Path, how: str) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(checkpoint.locate(trained).read_bytes())
    damaged(path, how)
    with pytest.raises(UserError) as caught:
        checkpoint.load_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_alone_cannot_be_resumed(trained: Path) -> None:
    network, _ = checkpoint.load_model(trained)
    optimizer = torch.optim.SGD(network.parameters())
    with pytest.raises(UserError, match="weights only"):
        checkpoint.load_training(checkpoint.locate(trained), network, optimizer)
