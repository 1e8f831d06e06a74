"""Sinks take the numbers of a run, each step once even if the run is resumed."""

import importlib.util
import json
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.lm.tracking.jsonl import MetricsWriter, read_metrics
from nanochat_jax.lm.tracking.trackers import TensorBoardSink, WandbSink

LINES = [
    {"step": np.int64(step), "loss": jnp.float32(1 / step), "val_loss": None}
    for step in (1, 2, 3)
]
WITHOUT = "is not installed, the extra `{}`"
tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboardX") is None,
    reason=f"tensorboardX {WITHOUT.format('tensorboard')}",
)
wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason=f"wandb {WITHOUT.format('wandb')}"
)


def write(sink, lines, resume=None):
    if resume is not None:
        sink.resume(resume)
    for line in lines:
        sink.write(line)
    sink.close()


# TensorBoard


def events(folder):
    """Returns the events of a folder in order; a record is length, CRC, data, CRC."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir()):  # as TensorBoard reads them
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def shown(folder):
    """Returns the scalars as TensorBoard shows them, and how often each is there."""
    scalars = {}
    for event in events(folder):
        if event.HasField("session_log"):
            hidden = [key for key in scalars if key[1] >= event.step]
            for key in hidden:
                del scalars[key]
        for value in event.summary.value:
            scalars.setdefault((value.tag, event.step), []).append(value.simple_value)
    return scalars


@tensorboard
def test_tensorboard_shows_each_number_by_its_name_and_step(tmp_path):
    write(TensorBoardSink(tmp_path / "tb"), LINES)
    expected = {("loss", step): [pytest.approx(1 / step)] for step in (1, 2, 3)}
    assert shown(tmp_path / "tb") == expected


@tensorboard
@pytest.mark.parametrize("step", [-1, 0, 2, 3])
def test_tensorboard_shows_no_step_of_a_resumed_run_twice(step, tmp_path):
    write(TensorBoardSink(tmp_path), LINES)
    later = [line for line in LINES if line["step"] > step]
    again = [{**line, "loss": 7.0} for line in later]
    write(TensorBoardSink(tmp_path), again, resume=step)
    assert shown(tmp_path) == {
        ("loss", i): [pytest.approx(1 / i if i <= step else 7.0)] for i in (1, 2, 3)
    }


@tensorboard
def test_nothing_is_made_before_something_is_written(tmp_path):
    sink = TensorBoardSink(tmp_path / "tb")
    sink.resume(3)
    sink.close()
    assert not (tmp_path / "tb").exists()


# Weights & Biases


class FakeWandb(types.ModuleType):
    """Keeps what it is given, where the service would."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.lines = [], []

    def Settings(self, **settings):
        return settings

    def init(self, **arguments):
        self.runs.append(arguments)
        return types.SimpleNamespace(
            id=arguments["id"],
            log=lambda values, step: self.lines.append({"step": step, **values}),
            finish=lambda: self.lines.append("finished"),
        )


@pytest.fixture
def service(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


def sink(folder):
    return WandbSink("project", {"lr": 0.1}, folder)


def test_wandb_gets_each_number_by_its_name_and_step(service, tmp_path):
    write(sink(tmp_path / "run"), LINES)
    assert service.lines == [
        *({"step": step, "loss": pytest.approx(1 / step)} for step in (1, 2, 3)),
        "finished",
    ]
    (run,) = service.runs
    assert run["project"] == "project" and run["config"] == {"lr": 0.1}
    assert run["dir"] == str(tmp_path / "run")


def test_a_resumed_run_is_the_same_run_of_wandb_and_no_step_is_logged_twice(
    service, tmp_path
):
    write(sink(tmp_path), LINES[:2])
    write(sink(tmp_path), LINES[1:], resume=1)
    steps = [line["step"] for line in service.lines if line != "finished"]
    assert steps == [1, 2, 3]
    first, second = service.runs
    assert first["id"] == second["id"]


def test_a_new_run_in_the_same_folder_is_another_run_of_wandb(service, tmp_path):
    write(sink(tmp_path), LINES[:1], resume=-1)
    write(sink(tmp_path), LINES[:1], resume=-1)
    first, second = service.runs
    assert first["id"] != second["id"]
    assert len(service.lines) == 4


def test_wandb_stays_off_the_network_unless_the_environment_says_otherwise(
    service, tmp_path, monkeypatch
):
    write(sink(tmp_path), LINES[:1])
    monkeypatch.setenv("WANDB_MODE", "online")
    write(sink(tmp_path), LINES[1:])
    offline, online = service.runs
    assert (offline["mode"], offline["resume"]) == ("offline", None)
    assert (online["mode"], online["resume"]) == ("online", "allow")


@wandb
def test_wandb_itself_takes_it_and_keeps_it_here(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    write(sink(tmp_path), LINES)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert json.loads((tmp_path / "wandb-run.json").read_text())["step"] == 3


# All of them


@pytest.mark.parametrize(
    ("make", "package", "extra"),
    [(TensorBoardSink, "tensorboardX", "tensorboard"), (sink, "wandb", "wandb")],
)
def test_without_its_package_a_sink_says_what_to_install(
    make, package, extra, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package} .*`nanochat-jax\[{extra}\]`"):
        make(tmp_path)


def test_the_metrics_file_is_a_sink_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(MetricsWriter(path), LINES)
    write(MetricsWriter(path), LINES[1:], resume=1)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
