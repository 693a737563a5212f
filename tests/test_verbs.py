"""evaluate, predict, export and summary, on one small trained run."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import run, small, tensors, write_pictures

from maskcore import __main__, checkpoint, data, evaluate, export, models, predict, summary


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pictures; one is stored lying on its side, as telephones do."""
    folder = write_pictures(tmp_path_factory.mktemp("data") / "pictures", 30)
    path = folder / "training" / "10004.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as image:
        image.save(path, quality=95, exif=exif)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run(*small(folder, out, "--epochs", 4, "--lr", 1e-3)) == 0
    return out


def verb(name: str, *arguments: object) -> int:
    """``maskcore NAME ...`` in this process; the exit status."""
    return __main__.main([name, *(str(argument) for argument in arguments)])


# ---- evaluate


def test_metrics_by_hand() -> None:
    true = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    said = np.array([0, 0, 1, 2, 1, 1, 0, 1, 0, 0])
    m = evaluate.metrics(true, said, 4)
    assert m.matrix.tolist() == [[2, 1, 1, 0], [1, 2, 0, 0], [2, 1, 0, 0], [0, 0, 0, 0]]
    assert m.accuracy == pytest.approx(4 / 10)
    assert m.precision == pytest.approx([2 / 5, 2 / 4, 0, 0])
    assert m.recall == pytest.approx([2 / 4, 2 / 3, 0, 0])
    assert m.f1 == pytest.approx([4 / 9, 4 / 7, 0, 0])
    assert m.support.tolist() == [4, 3, 3, 0]


def test_cross_entropy_of_logits() -> None:
    logits = np.random.default_rng(0).normal(0, 30, (20, 5)).astype(np.float32)
    labels = np.arange(20) % 5
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(labels), reduction="none"
    )
    assert evaluate.cross_entropy(logits, labels) == pytest.approx(expected.numpy(), abs=1e-9)


def test_evaluate_validation_is_what_training_said(trained: Path, tmp_path: Path) -> None:
    assert verb("evaluate", trained, "--out", tmp_path / "out") == 0
    measured = json.loads((tmp_path / "out/metrics.json").read_text())
    best = json.loads((trained / "result.json").read_text())["best"]
    assert measured["split"] == "val"
    assert measured["epoch"] == best["epoch"]
    assert measured["accuracy"] == best["val_accuracy"]
    assert measured["cross_entropy"] == pytest.approx(best["val_cross_entropy"], abs=1e-5)
    assert measured["confusion"] == [
        [int(cell) for cell in row[1:]]
        for row in csv.reader((trained / "confusion.csv").open())
        if row[0] in data.CLASSES
    ]


def test_evaluate_writes_figures_tables_and_mistakes(trained: Path, tmp_path: Path, capsys: Any) -> None:
    pictures = write_pictures(tmp_path / "other", 12, seed=5)
    labels = json.loads((pictures / "train_gt.json").read_text())
    # Wrong labels make mistakes certain.
    swapped = {name: (label + 1) % 3 for name, label in labels.items()}
    (pictures / "train_gt.json").write_text(json.dumps(swapped))
    (pictures / "training" / "10003.jpg").write_bytes(b"broken")
    assert verb("evaluate", trained, "--data", pictures, "--out", tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert "precision" in text
    assert "confusion matrix" in text
    measured = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (measured["pictures"], measured["skipped"], measured["split"]) == (11, 1, "all")
    matrix = np.array(measured["confusion"])
    assert measured["accuracy"] == pytest.approx(np.trace(matrix) / 11)
    with (tmp_path / "out/mistakes.csv").open(newline="") as file:
        mistakes = list(csv.DictReader(file))
    assert len(mistakes) == 11 - np.trace(matrix)
    assert mistakes[0]["file"].startswith("training/")
    for name in ("confusion.png", "mistakes.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert min(image.size) > 200
    assert verb("evaluate", trained, "--data", pictures, "--out", tmp_path / "out") == 2


def test_evaluate_matches_classes_by_name(trained: Path, folder: Path, tmp_path: Path) -> None:
    sorted_folder = tmp_path / "folders"
    labels = json.loads((folder / "train_gt.json").read_text())
    for name, label in labels.items():
        if label != 0:  # the network's first class is missing here
            (sorted_folder / data.CLASSES[label]).mkdir(parents=True, exist_ok=True)
            copy = sorted_folder / data.CLASSES[label] / name
            copy.write_bytes((folder / "training" / name).read_bytes())
    assert verb("evaluate", trained, "--data", sorted_folder, "--out", tmp_path / "f") == 0
    assert verb("evaluate", trained, "--data", folder, "--out", tmp_path / "j") == 0
    few, all_ = (json.loads((tmp_path / d / "metrics.json").read_text()) for d in "fj")
    for name in data.CLASSES[1:]:
        assert few["classes"][name]["recall"] == all_["classes"][name]["recall"]
    (sorted_folder / "cats").mkdir()
    (sorted_folder / "cats" / "1.jpg").write_bytes((folder / "training/10001.jpg").read_bytes())
    assert verb("evaluate", trained, "--data", sorted_folder, "--out", tmp_path / "c") == 2
    assert not (tmp_path / "c").exists()


# ---- predict


def predictions(trained: Path, out: Path, *pictures: object) -> dict[str, dict[str, Any]]:
    assert verb("predict", trained, *pictures, "--json", out) == 0
    return {entry["file"]: entry for entry in json.loads(out.read_text())["pictures"]}


def test_predict_and_training_see_the_same_picture(trained: Path, folder: Path, tmp_path: Path) -> None:
    """Every path gives a picture the same probabilities, the one on its side included."""
    found = predictions(trained, tmp_path / "p.json", folder / "training")
    network, meta = checkpoint.load_model(trained)
    everything = data.find(folder)
    loader = data.Loader(everything.pictures, meta.preprocess, 7, augment=None)
    loader.scan()
    for batch in loader.epoch(0):
        with torch.inference_mode():
            rows = network(batch.images).double().softmax(1)
        for index, row in zip(batch.indices.tolist(), rows, strict=True):
            told = found[everything.pictures[index].path.name]["probabilities"]
            assert list(told.values()) == pytest.approx(row.tolist(), abs=1e-6)
    # Alone, by name, in a batch of one: still the same.
    alone = predictions(trained, tmp_path / "a.json", folder / "training" / "10004.jpg")
    expected = found["10004.jpg"]["probabilities"]
    assert alone["10004.jpg"]["probabilities"] == pytest.approx(expected, abs=1e-6)
    turned = tmp_path / "upright.png"
    data.decode(folder / "training" / "10004.jpg").save(turned)
    upright = predictions(trained, tmp_path / "u.json", turned)
    assert upright["upright.png"]["probabilities"] == pytest.approx(expected, abs=1e-6)


def test_evaluation_and_exports_see_it_too(trained: Path, folder: Path, tmp_path: Path) -> None:
    """The picture on its side: evaluate measures it, and an export says how to read it, as predict does."""
    found = predictions(trained, tmp_path / "p.json", folder / "training")
    # With labels that are all wrong every picture is in the list of mistakes.
    copied = tmp_path / "wrong-labels"
    shutil.copytree(folder, copied)
    labels = {name: (entry["code"] + 1) % 3 for name, entry in found.items()}
    (copied / "train_gt.json").write_text(json.dumps(labels))
    assert verb("evaluate", trained, "--data", copied, "--out", tmp_path / "out") == 0
    with (tmp_path / "out/mistakes.csv").open(newline="") as file:
        rows = {Path(row["file"]).name: row for row in csv.DictReader(file)}
    assert rows.keys() == found.keys()
    for name, row in rows.items():
        assert row["predicted"] == found[name]["class"]
        assert float(row["probability"]) == pytest.approx(
            max(found[name]["probabilities"].values()), abs=2e-6
        )
    path = tmp_path / "net.pt2"
    assert verb("export", trained, "--format", "torch", "--out", path) == 0
    extra = {"maskcore": ""}
    program = torch.export.load(path, extra_files=extra).module()
    preprocess = data.Preprocess.from_dict(json.loads(extra["maskcore"])["preprocess"])
    pixels = data.load(folder / "training" / "10004.jpg", preprocess)
    (probabilities,) = program(data.network_input(pixels[None]).contiguous()).tolist()
    assert probabilities == pytest.approx(list(found["10004.jpg"]["probabilities"].values()), abs=1e-4)


def test_submission_has_the_competitions_form(trained: Path, folder: Path, tmp_path: Path) -> None:
    assert verb("predict", trained, folder / "training", "--csv", tmp_path / "s.csv") == 0
    content = (tmp_path / "s.csv").read_bytes()
    assert b"\r" not in content
    lines = content.decode().splitlines()
    assert lines[0] == "Id,Category"
    assert len(lines) == 31
    found = predictions(trained, tmp_path / "p.json", folder / "training")
    for line in lines[1:]:
        name, code = line.split(",")
        assert found[name]["code"] == int(code)
        assert found[name]["class"] == data.CLASSES[int(code)]
        assert sum(found[name]["probabilities"].values()) == pytest.approx(1)


def test_bad_files_are_listed_and_not_fatal(trained: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    mixed = tmp_path / "mixed"
    (mixed / "deep").mkdir(parents=True)
    good = (folder / "training" / "10001.jpg").read_bytes()
    (mixed / "deep" / "=cmd.jpg").write_bytes(good)
    (mixed / "short.jpg").write_bytes(good[:200])
    (mixed / "notes.txt").write_text("hello")
    (mixed / ".hidden").write_text("hello")
    assert verb("predict", trained, mixed, "--csv", tmp_path / "s.csv", "--json", "-") == 0
    captured = capsys.readouterr()
    assert "1 pictures classified, 2 skipped" in captured.err
    assert "short.jpg" in captured.err
    report = json.loads(captured.out)
    assert sorted(entry["file"] for entry in report["skipped"]) == ["notes.txt", "short.jpg"]
    assert (tmp_path / "s.csv").read_text().splitlines()[1].startswith("deep/=cmd.jpg,")
    assert verb("predict", trained, mixed / "deep" / "=cmd.jpg", "--csv", tmp_path / "t.csv") == 0
    assert (tmp_path / "t.csv").read_text().splitlines()[1].startswith("'=cmd.jpg,")
    assert verb("predict", trained, mixed / "notes.txt") == 2


def test_the_bar_counts_whatever_is_written(
    trained: Path, folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    counted: list[int] = []
    monkeypatch.setattr(predict.Progress, "add", lambda _, count: counted.append(count))
    for output in ([], ["--csv", tmp_path / "s.csv"]):
        counted.clear()
        assert verb("predict", trained, folder / "training", *output) == 0
        assert sum(counted) == 30


def test_more_pictures_than_fit_a_batch(trained: Path, folder: Path) -> None:
    network, meta = checkpoint.load_model(trained)
    paths = sorted((folder / "training").iterdir())
    results = list(predict.classify(network, meta.preprocess, iter(paths), batch_size=4))
    assert [result.path for result in results] == paths
    once = predict.classify(network, meta.preprocess, paths, batch_size=64)
    for one, other in zip(results, once, strict=True):
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-6)


# ---- export


def images(count: int) -> torch.Tensor:
    return torch.rand((count, 3, 32, 32), generator=torch.Generator().manual_seed(1))


def expected(trained: Path, count: int) -> np.ndarray:
    network, _ = checkpoint.load_model(trained)
    with torch.inference_mode():
        probabilities: np.ndarray = network(images(count)).softmax(1).numpy()
    return probabilities


def test_onnx_agrees_and_has_plain_operators(trained: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "net.onnx"
    assert verb("export", trained, "--format", "onnx", "--out", path) == 0
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        (ours,) = session.run(None, {"images": images(count).numpy()})
        np.testing.assert_allclose(ours, expected(trained, count), atol=1e-4)
    graph = onnx.load(path)
    assert {node.domain for node in graph.graph.node} == {""}
    about = json.loads({p.key: p.value for p in graph.metadata_props}["maskcore"])
    assert about["classes"] == list(data.CLASSES)
    assert data.Preprocess.from_dict(about["preprocess"]).size == 32


def test_torch_program_runs_without_maskcore(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    assert verb("export", trained, "--format", "torch", "--out", path) == 0
    torch.save(images(4), tmp_path / "in.pt")
    script = (
        "import sys, torch\n"
        "extra = {'maskcore': ''}\n"
        "program = torch.export.load(sys.argv[1], extra_files=extra).module()\n"
        "torch.save(program(torch.load(sys.argv[2])), sys.argv[3])\n"
        "assert 'maskcore' not in sys.modules and 'preprocess' in extra['maskcore']\n"
    )
    files = [path, tmp_path / "in.pt", tmp_path / "out.pt"]
    subprocess.run([sys.executable, "-c", script, *files], check=True, cwd=tmp_path)
    probabilities = torch.load(tmp_path / "out.pt").numpy()
    np.testing.assert_allclose(probabilities, expected(trained, 4), atol=1e-4)


def test_safetensors_fit_the_torch_twin(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    assert verb("export", trained, "--format", "safetensors", "--out", path) == 0
    twin = models.torch_twin(models.create("baseline", 3, 32)).eval()
    twin.load_state_dict(tensors(path))
    with torch.inference_mode():
        probabilities = twin(images(2)).softmax(1).numpy()
    np.testing.assert_allclose(probabilities, expected(trained, 2), atol=1e-4)


def test_export_that_disagrees_is_not_written(
    trained: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    class Wrong(export._Classifier):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) + 0.01

    monkeypatch.setattr(export, "_Classifier", Wrong)
    path = tmp_path / "net.pt2"
    path.write_text("old")
    assert verb("export", trained, "--format", "torch", "--out", path) == 1
    assert "differ from maskcore's by 0.01" in capsys.readouterr().err
    assert path.read_text() == "old"


# ---- summary, and the command itself


def test_summary_totals_of_the_report(capsys: Any) -> None:
    assert verb("summary", "final") == 0
    text = capsys.readouterr().out
    assert "Total params: 13,305,315" in text
    assert "Trainable params: 13,304,355" in text
    assert "Non-trainable params: 960" in text
    assert "flatten (Flatten)" in text
    assert "(None, 20736)" in text
    assert verb("summary", "baseline") == 0
    assert "Total params: 4,294,739" in capsys.readouterr().out


def test_summary_of_a_run_is_that_of_its_network(trained: Path, capsys: Any) -> None:
    assert verb("summary", trained) == 0
    assert capsys.readouterr().out.strip() == summary.table(models.create("baseline", 3, 32))


def test_help_lists_every_verb(capsys: Any) -> None:
    assert __main__.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in __main__.VERBS:
        assert f"  {name} " in text
        assert callable(importlib.import_module(f"maskcore.{name}").main)
    assert __main__.main(["--version"]) == 0
    assert "instruction set" in capsys.readouterr().out


BAD: dict[str, tuple[str, list[str], str]] = {
    "evaluate nothing": ("evaluate", ["nowhere"], "no checkpoint or run folder nowhere"),
    "evaluate no run": ("evaluate", ["empty"], "empty is not a run's folder"),
    "evaluate no data": ("evaluate", ["RUN", "--data", "nowhere"], "nowhere"),
    "evaluate threads": ("evaluate", ["RUN", "--threads", "0"], "threads must be 1 to"),
    "evaluate no checkpoint": ("evaluate", [], "checkpoint"),
    "predict nothing": ("predict", ["RUN"], "pictures"),
    "predict missing": ("predict", ["RUN", "nowhere.jpg"], "nowhere.jpg"),
    "predict empty folder": ("predict", ["RUN", "empty"], "no files in the folder empty"),
    "predict batch": ("predict", ["RUN", "text", "--batch-size", "-1"], "batch-size must be"),
    "predict no picture": ("predict", ["RUN", "text"], "none of the files"),
    "predict into nowhere": ("predict", ["RUN", "text", "--csv", "no/s.csv"], "no folder to write"),
    "predict csv to stdout": ("predict", ["RUN", "text", "--csv", "-"], "csv must be a file"),
    "predict csv no name": ("predict", ["RUN", "text", "--csv", ""], "csv must be a file"),
    "predict csv is a folder": ("predict", ["RUN", "text", "--csv", "empty"], "empty is no regular file"),
    "predict json to a device": ("predict", ["RUN", "text", "--json", os.devnull], "no regular file"),
    "predict both in one": ("predict", ["RUN", "text", "--csv", "a", "--json", "./a"], "different names"),
    "predict no name": ("predict", ["RUN", ""], "empty name"),
    "predict by a text": ("predict", ["text", "text"], "cannot be used as a checkpoint"),
    "export no format": ("export", ["RUN"], "--format"),
    "export format": ("export", ["RUN", "--format", "pickle"], "format"),
    "export to a folder": ("export", ["RUN", "--format", "onnx", "--out", "empty"], "is a folder"),
    "export nowhere": ("export", ["RUN", "--format", "torch", "--out", "no/x"], "no folder to write"),
    "summary of nothing": ("summary", ["resnet"], "neither a network"),
    "summary too small": ("summary", ["final", "--image-size", "20"], "too small"),
    "summary size of a run": ("summary", ["RUN", "--image-size", "64"], "leave the flags out"),
    "export to a device": (
        "export",
        ["RUN", "--format", "safetensors", "--out", os.devnull],
        "no regular file",
    ),
    "summary many classes": ("summary", ["final", "--num-classes", "9" * 30], "at most 100000"),
    "summary classes": ("summary", ["final", "--num-classes", "1"], "at least 2 classes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(
    case: str, trained: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text").write_text("no picture")
    name, arguments, expected_text = BAD[case]
    assert verb(name, *(str(trained) if a == "RUN" else a for a in arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"maskcore {name}: error: ")
    assert expected_text in lines[-1]
    assert sum("error:" in line for line in lines) == 1
    assert not any("Traceback" in line for line in lines)


def test_unknown_verb_is_one_sentence(capsys: Any) -> None:
    assert __main__.main(["fly"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_missing_package_is_named_with_its_command(
    trained: Path, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert verb("export", trained, "--format", "onnx", "--out", tmp_path / "x.onnx") == 2
    assert "pip install onnx onnxscript" in capsys.readouterr().err
