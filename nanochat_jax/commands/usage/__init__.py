"""What a person types and is told: commands, flags, help, errors and Ctrl-C.

ctrl_c    Ctrl-C while a compiler works
ending    errors, and how a command that was interrupted ends
flags     flags of a command, from the fields of its dataclass
help      what `--help` prints
parsing   values of flags from words
registry  commands by name, loaded when they are used
words     values of Python from text
"""

from nanochat_jax.commands.usage import (
    ctrl_c as ctrl_c,
    ending as ending,
    help as help,
    parsing as parsing,
    registry as registry,
)
from nanochat_jax.commands.usage.flags import POSITIONAL as POSITIONAL
