"""Checkpoints of a run: one folder a step, written by Orbax.

`D/120` holds the training state after 120 steps, and its JSON record `meta`. A folder
gets its name once all of it is on disk, so a run that is killed leaves its last whole
checkpoint. `SHA256SUMS` in it is checked before anything is read (by hand: `sha256sum
-c SHA256SUMS`), because Orbax keeps no checksum of array data: a damaged file may come
back as wrong numbers.

This uses Orbax's API v1. It does all that is needed here without a warning, reads what
v0 wrote, and is the one that will stay.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from nanochat_jax.lm.checkpoints import checksums, differences, relaid, renamed

Tree = TypeVar("Tree")

# Copies of arrays that are being compressed and written, at a time.
_WRITE_BYTES = 64 << 20


class Checkpoints:
    """Saves and restores the states of one run.

    Leaving the context waits for the save in progress, after an exception too, and
    raises its error. Reading writes nothing and creates nothing.

    Attributes:
      directory: Folder with one folder a step; it need not exist yet.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
    ):
        """Settles the paths; nothing is read or written yet.

        Args:
          directory: Folder with the steps, or for reading the folder of one step.
          keep_last: Checkpoints to keep; older ones are deleted after each save.
          keep_every: Steps that are multiples of it are kept for good.

        Raises:
          ValueError: If `keep_last` or `keep_every` is less than 1.
        """
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(
                "`keep_last` and `keep_every` must be at least 1, got "
                f"{keep_last} and {keep_every}."
            )
        path = Path(directory).expanduser().absolute()
        is_step = path.name.isdecimal() and (path / "state").is_dir()
        self.directory = path.parent if is_step else path
        self._opened_step = int(path.name) if is_step else None
        policies = ocp.training.preservation_policies
        self._keep: list[Any] = [policies.LatestN(keep_last)]
        if keep_every is not None:
            self._keep.append(policies.EveryNSteps(keep_every))
        self._writer: ocp.training.Checkpointer | None = None
        self._pending: Any = None
        self._intact: set[Path] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()

    def steps(self) -> list[int]:
        """Returns the steps that are on disk, in order."""
        folders = [path for path in self.directory.glob("*") if path.is_dir()]
        return sorted(int(path.name) for path in folders if path.name.isdecimal())

    def latest_step(self) -> int | None:
        """Returns the last step on disk, or the one whose folder was opened."""
        if self._opened_step is not None:
            return self._opened_step
        return max(self.steps(), default=None)

    def check_start(self, step: int) -> None:
        """Refuses a run from `step` on if the directory has later steps.

        The next resumption would take those for the latest.

        Args:
          step: Step at which the run starts or resumes.

        Raises:
          ValueError: If a checkpoint is later than `step`.
        """
        later = [other for other in self.steps() if other > step]
        if later:
            raise ValueError(
                f"{self.directory}: the run starts at step {step}, but later "
                f"checkpoints are there: {later}. Go on from the last of them by "
                f"`--resume {self.directory}`, choose another `--checkpoint-dir`, or "
                "delete them."
            )

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Saves a state as it is now, on accelerators in the background.

        A save still in progress is awaited first, and its error raised. A step that is
        on disk already is left as it is. On processors it returns when the files are
        written: arrays that are being written could not be donated, and a step would
        make second ones.

        Args:
          step: Steps taken so far; names the folder.
          state: Tree of arrays, none of them empty or a typed PRNG key. It may be
            donated as soon as this returns.
          meta: Record of the run, as JSON values.

        Raises:
          ValueError: If the directory has later steps that this object did not write.
          TypeError: If `meta` has values that JSON cannot hold.
        """
        self.wait()
        if step in self.steps():
            return
        if self._writer is None:
            self.check_start(step)
            self._writer = self._open_writer(state)
        record: Any = {"meta": differences.as_json(meta), **relaid.record_of(state)}
        self._pending = self._writer.save_async(
            step, state, custom_metadata=record, force=True
        )
        if jax.default_backend() == "cpu":
            self.wait()

    def wait(self) -> None:
        """Waits for the save in progress and raises its error, if any."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(
        self,
        target: Tree,
        step: int | None = None,
        *,
        partial: bool = False,
        names: Mapping[str, str] | None = None,
    ) -> Tree:
        """Restores a state into types, places and layout of `target`.

        Args:
          target: Tree of arrays, or of `ShapeDtypeStruct`s. A leaf without a sharding
            comes back on the default device, a NumPy array as one of the host.
          step: Step to restore; the latest if not given.
          partial: Whether `target` may lack parts of the stored state. These are not
            read: a dict with `params` alone restores nothing of the optimizer.
          names: Stored names of `NamedTuple` fields that had others.

        Returns:
          The stored state as a tree like `target`.

        Raises:
          ValueError: If there is no such checkpoint, it is damaged, or its state does
            not have the paths, shapes and dtypes of `target`.
        """
        folder, names = self._find(step), names or {}
        with self._reading(folder):
            described: Any = ocp.metadata(str(folder))
            stored = differences.layout(described.metadata)
        read = relaid.as_stored(target, described.custom_metadata or {})
        as_stored = renamed.as_stored(read, names) if names else read
        # Orbax alone would cast to the target's dtypes without a word.
        wanted = differences.layout(as_stored)
        if partial:
            stored = {path: stored[path] for path in stored.keys() & wanted.keys()}
        changed = differences.changes(stored, wanted)
        if changed:
            raise ValueError(
                f"{folder}: the stored state is not that of this model and optimizer.\n"
                f"{differences.listed(differences.differences(changed, 'wanted'))}\n"
                "Use the settings of the run that wrote it, or train from the start in "
                "a new directory."
            )
        context = ocp.Context()
        # Earlier formats have entries for `None` too, which fields of today lack.
        context.pytree_options.loading.partial_load = partial or bool(names)
        with self._reading(folder), context:
            loaded: Any = ocp.load(str(folder), jax.tree.map(_abstract, as_stored))
        loaded = renamed.from_stored(read, loaded, names) if names else loaded
        return relaid.from_stored(target, loaded)

    def read_meta(
        self, step: int | None = None, *, verify: bool = True
    ) -> dict[str, Any]:
        """Reads the record given to `save` as `meta`.

        Args:
          step: Step to read; the latest if not given.
          verify: Whether the checksums of the checkpoint are checked before.

        Returns:
          The record, as JSON gives it back: tuples are lists, keys are strings.

        Raises:
          ValueError: If there is no such checkpoint or it is damaged.
        """
        folder = self._find(step)
        with self._reading(folder, verify):
            record: Any = ocp.metadata(str(folder)).custom_metadata
            return record["meta"]

    def _open_writer(self, state: Any) -> ocp.training.Checkpointer:
        """Returns Orbax's writer for states like this; it creates the directory."""
        context = ocp.Context()
        # The largest array must fit, and by default there is a copy of every array.
        largest = max((x.nbytes for x in jax.tree.leaves(state)), default=0)
        context.memory.write_concurrent_bytes = max(_WRITE_BYTES, largest)
        # Called when all files are written, just before the folder gets its name.
        context.asynchronous.post_finalization_callback = functools.partial(
            checksums.write, self.directory
        )
        policies: Any = ocp.training.preservation_policies
        return ocp.training.Checkpointer(
            str(self.directory),
            context=context,
            preservation_policy=policies.AnyPreservationPolicy(self._keep),
            cleanup_tmp_directories=True,
        )

    def _find(self, step: int | None) -> Path:
        """Returns the folder of a step, or says which steps there are."""
        steps = self.steps()
        step = self.latest_step() if step is None else step
        if step not in steps:
            which = "" if step is None else f" of step {step}"
            raise ValueError(
                f"{self.directory}: no checkpoint{which} is there. Give the checkpoint "
                "directory of an earlier run, or the folder of one of its steps. Steps "
                f"in this one: {steps or 'none'}."
            )
        return self.directory / str(step)

    @contextlib.contextmanager
    def _reading(self, folder: Path, verify: bool = True) -> Iterator[None]:
        """Checks a checkpoint's files, and names it in errors of reading."""
        if verify and folder not in self._intact:
            if damage := checksums.damage(folder):
                raise self._unreadable(folder, damage)
            self._intact.add(folder)
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # The device is full; the checkpoint is sound.
        except Exception as error:
            raise self._unreadable(folder, [repr(error)]) from error

    def _unreadable(self, folder: Path, damage: list[str]) -> ValueError:
        """Returns the error for a damaged checkpoint, with the steps to try instead."""
        others = [step for step in self.steps() if step != int(folder.name)]
        remedy = "There is no other one: train from the start in a new directory."
        if others:
            other = self.directory / str(others[-1])
            remedy = (
                f"Try another one, such as {other}. To resume from an earlier one, "
                "delete the folder of this one first, or choose another "
                f"`--checkpoint-dir`. There are steps {others}."
            )
        return ValueError(
            f"{folder}: damaged checkpoint.\n{differences.listed(damage)}\n{remedy}"
        )


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf
    sharding = getattr(leaf, "sharding", None) or jnp.zeros(()).sharding
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
