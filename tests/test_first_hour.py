"""The README's first hour, block by block: each does what the text around it says."""

import re
import shlex
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import nanochat_jax as nj
from nanochat_jax import cli
from nanochat_jax.codecs import is_quantized

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")

# Of `train` in the README, made small; `--total-steps` given there comes first.
SMALL = (
    "--dim 32 --n-layers 1 --n-heads 2 --n-kv-heads 2 --batch-size 2 --max-seq-len 16 "
    "--warmup-steps 0 --eval-batches 1 --sample-tokens 2 --galore-rank 4"
)


class Reader:
    """Runs the Python blocks of the README, in order, as one program.

    Attributes:
      names: Names that the blocks have made so far.
    """

    def __init__(self):
        self.names = {"__name__": "readme"}
        found = re.finditer(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
        self.blocks = [(m.start(1), m.group(1)) for m in found]
        self.done = 0

    def read_to(self, words):
        """Runs the blocks up to, and with, the first that has these words."""
        index = next(i for i, (_, text) in enumerate(self.blocks) if words in text)
        for start, text in self.blocks[self.done : index + 1]:
            # Empty lines before it, so that a traceback names the line of the README.
            lines = "\n" * TEXT[:start].count("\n")
            exec(compile(lines + text, "README.md", "exec"), self.names)
        self.done = max(self.done, index + 1)
        return self.names


@pytest.fixture(scope="module")
def reader():
    return Reader()


def stored(state):
    """Returns the names of the codecs in a state."""
    leaves = jax.tree.leaves(state, is_leaf=is_quantized)
    return {type(x.codec).__name__ for x in leaves if is_quantized(x)}


def moved(before, after):
    return [
        bool(jnp.any(a != b))
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    ]


def test_the_first_step_is_described_as_shown(reader, capsys):
    names = reader.read_to("nj.describe(tx, params)")
    shown = re.search(r"^```text\n(.*?)^```", TEXT, re.M | re.S)
    assert capsys.readouterr().out.strip() == shown.group(1).strip()
    assert stored(names["state"]) == {"Int8", "Dynamic8"}
    assert all(moved(names["params"], jax.tree.map(jnp.ones_like, names["params"])))


def test_nnx_trains_in_8_bits(reader, capsys):
    names = reader.read_to("nnx.Optimizer(")
    nnx, model, optimizer = names["nnx"], names["model"], names["optimizer"]
    before = nnx.as_pure(nnx.state(model, nnx.Param))
    loss = names["train_step"](model, optimizer, jnp.ones((8, 64)), jnp.ones((8, 256)))
    assert loss > 0
    assert all(moved(before, nnx.as_pure(nnx.state(model, nnx.Param))))
    assert stored(nnx.as_pure(optimizer.opt_state)) == {"Int8"}
    assert "momentum Int8" in capsys.readouterr().out


def test_linen_trains_in_8_bits(reader, capsys):
    names = reader.read_to("TrainState.create(")
    assert stored(names["train_state"].opt_state) == {"Int8"}
    assert all(moved(names["variables"]["params"], names["train_state"].params))
    assert "momentum Int8" in capsys.readouterr().out


def test_equinox_trains_in_8_bits(reader, capsys):
    names = reader.read_to("eqx.nn.MLP(")
    assert stored(names["eqx_state"]) == {"Int8"}
    assert "256x64  64x256  matrix" in capsys.readouterr().out  # `(out, in)`


def test_a_checkpoint_holds_all_of_a_state_of_any_framework(reader, tmp_path):
    names = reader.read_to("checkpointer.restore(")
    held = {"params": names["params"], "state": names["state"]}
    chex.assert_trees_all_equal(names["restored"], held)
    ocp, nnx = names["ocp"], names["nnx"]

    def round_trip(name, tree):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / name, tree)
        with ocp.StandardCheckpointer() as checkpointer:
            like = jax.eval_shape(lambda x: x, tree)
            restored = checkpointer.restore(tmp_path / name, like)
        chex.assert_trees_all_equal(restored, tree)
        return restored

    linen = round_trip("linen", names["train_state"].opt_state)
    equinox = round_trip("equinox", names["eqx_state"])
    assert stored(linen) == stored(equinox) == {"Int8"}
    both = names["model"], names["optimizer"]
    nnx.update(both, round_trip("nnx", nnx.as_pure(nnx.state(both))))
    assert stored(nnx.as_pure(names["optimizer"].opt_state)) == {"Int8"}
    assert jnp.isfinite(names["train_step"](*both, jnp.ones((8, 64)), 1.0))


def test_the_other_recipes_do_what_they_say(reader):
    names = reader.read_to("nj.dequantize(")
    assert stored(names["plain"]) == set()
    names = reader.read_to("nj.init_sharded(")
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.sharding), tree)
    assert shapes(names["wanted"]) == shapes(names["placed"])
    names = reader.read_to("inject_hyperparams")
    injected, params, grads = (names[k] for k in ("injected", "params", "grads"))
    halved = names["adjustable"].update(grads, injected, params)[0]
    plain = nj.muon(0.02, bits=8)
    whole = plain.update(grads, plain.init(params), params)[0]
    kernel = lambda tree: tree["attention"]["query"]["kernel"]
    chex.assert_trees_all_close(2 * kernel(halved), kernel(whole), rtol=1e-5)
    names = reader.read_to("optax.MultiSteps")
    update = names["every_fourth"].update
    state = names["every_fourth"].init(params)
    for step in range(4):
        updates, state = update(grads, state, params)
        assert any(moved(updates, optax.tree.zeros_like(updates))) == (step == 3)
    tuned = nj.describe(names["tuned"], params)
    assert {x.label for x in tuned.leaves if x.path.startswith("embed")} == {"frozen"}


def test_the_rest_of_the_readme_runs(reader):
    names = reader.read_to("scale_by_shape")
    assert stored(names["state"]) == {"Int8", "Int4"}
    names = reader.read_to(reader.blocks[-1][1])
    assert names["config"].total_steps is None


def test_the_commands_of_the_readme_run_in_order(tmp_path, monkeypatch, capsys):
    """`train`, `--resume` with more steps, `generate`, `plan`, and `export`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    section = TEXT.split("## Training from the command line")[1]
    first = re.search(r"^```bash\n(.*?)^```", section, re.M | re.S).group(1)
    later = ["nanochat-jax export --checkpoint runs/a --output model.safetensors"]
    assert later[0] in section
    for line in [*first.splitlines(), *later]:
        args = shlex.split(line)[1:]
        if args[0] == "train" and "--resume" not in args:
            args += shlex.split(f"{SMALL} --total-steps 2")
        if args[0] == "train" and "--resume" in args:
            args[args.index("--total-steps") + 1] = "4"
        if args[0] == "plan":
            args += shlex.split(f"{SMALL} --no-compile")
        if args[0] == "generate":
            args[args.index("--max-tokens") + 1] = "8"
        assert cli.main(args) == 0, capsys.readouterr()
    assert (tmp_path / "runs/a/4").is_dir()
    assert (tmp_path / "model.safetensors").is_file()
