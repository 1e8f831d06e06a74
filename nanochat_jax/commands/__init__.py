"""The commands of `nanochat-jax`, one per module: a dataclass of flags that can `run`.

compare, doctor, export, generate, import_, plan, plot, prepare_data, train: the
commands.
launch           from the words of a command line to a command that runs
messages         what `train` prints before and after the steps
reports/         what commands print about a machine or a run
shared           flags, output and errors that commands have in common
stored_settings  settings that a run takes from a model or a checkpoint
usage/           what a person types and is told: flags, help, errors and Ctrl-C
"""

from nanochat_jax.commands.launch import command_of as command_of, run as run
