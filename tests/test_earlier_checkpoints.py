"""Checkpoints of format 1, with other names of fields and more settings, are read."""

import tarfile
from pathlib import Path

import chex
import pytest

from nanochat_jax.config import Config
from nanochat_jax.lm.checkpoints import Checkpoints, load_trained, record, renamed
from nanochat_jax.lm.tracking import make_display
from nanochat_jax.lm.training import (
    compile_train_step,
    init_state,
    loop,
    make_run,
    resume,
)
from nanochat_jax.lm.training.reporter import Reporter

FORMAT_1 = Path(__file__).parent / "data" / "checkpoint_format_1.tar.xz"
# Written by the version that made the checkpoint, which went on to step 6.
LOSSES = {5: 3.432910919189453, 6: 3.4399898052215576}


@pytest.fixture
def checkpoints(tmp_path):
    """Step 4 of 6, with an 8-bit low-rank momentum and a complement in 4 bits."""
    with tarfile.open(FORMAT_1) as archive:
        archive.extractall(tmp_path / "run", filter="data")
    return Checkpoints(tmp_path / "run")


def settings(checkpoints):
    meta = checkpoints.read_meta()
    assert meta["format"] == 1
    found = record.settings_in(meta, "old")
    return Config(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    )


class Losses:
    """A sink that keeps the losses of steps."""

    def __init__(self):
        self.found = {}

    def resume(self, step):
        pass

    def write(self, values):
        if "loss" in values:
            self.found[int(values["step"])] = float(values["loss"])

    def close(self):
        pass


def test_a_checkpoint_of_format_1_goes_on_as_it_would_have(checkpoints):
    run, sink = make_run(settings(checkpoints)), Losses()
    state = resume.restore(run, checkpoints, say=lambda line: None)
    assert int(state.step) == 4
    step = compile_train_step(run)
    loop.fit(run, state, step, Reporter(run, 4, make_display(6), [sink]))
    assert sink.found == pytest.approx(LOSSES, abs=1e-4)


def test_its_parameters_can_be_read_alone(checkpoints):
    trained = load_trained(checkpoints.directory)
    assert trained.step == 4
    assert trained.config.dim == 16


def test_names_are_changed_of_fields_and_not_of_parameters(checkpoints):
    run = make_run(settings(checkpoints))
    names = record.stored_names(checkpoints.read_meta())
    state = init_state(run)
    tree = {"rest": state, "basis": {"complement": state.step}}
    stored = renamed.as_stored(tree, names)
    assert set(stored) == {"rest", "basis"}
    assert set(stored["basis"]) == {"complement"}
    assert "in_a_row" in stored["rest"]["guard"]
    again = renamed.from_stored(tree, stored, names)
    chex.assert_trees_all_equal(again, tree)


def test_a_setting_that_is_gone_is_refused_by_name(checkpoints):
    meta = checkpoints.read_meta()
    meta["config"] |= {"galore_stagger": True, "quant_codec": "mulaw8"}
    with pytest.raises(ValueError, match=r"galore_stagger(.|\n)*quant_codec"):
        record.settings_in(meta, "old")
