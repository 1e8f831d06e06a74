"""`nanochat-jax plan`: memory and operations of a run, without running it."""

import dataclasses

from nanochat_jax.commands.shared import Flags, settings_of, usage_errors
from nanochat_jax.config import Config, schema


@dataclasses.dataclass(frozen=True)
class PlanFlags(Flags):
    """Flags of `plan` besides the settings.

    Attributes:
      json: Whether to print one JSON object.
      compile: Whether to compile the step. Without, the plan has what shapes alone
        tell, within seconds, and not the temporaries and the peak.
      parameters: Whether to print, in place of the plan, what the optimizer does with
        each parameter: its view as matrices, optimizer, rate and state, and why.
    """

    json: bool = False
    compile: bool = True
    parameters: bool = False


@dataclasses.dataclass(frozen=True)
class Plan(Config, PlanFlags):
    """Prints groups, exact bytes of state, and peak memory of a compiled step.

    Nothing is trained. With `--memory-limit` it tells whether the step fits, and if not
    names the cheapest settings that fit, in the order of their cost in loss. With a
    mesh nothing is compiled either, and the devices need not exist: it prints the bytes
    that each of them holds and sends.
    """

    def run(self) -> None:
        """Prints the plan."""
        config = settings_of(self)
        with usage_errors():
            schema.require(
                (
                    self.compile or not config.memory_limit or bool(config.mesh),
                    "`--memory-limit` is about a compiled step. Leave out "
                    "`--no-compile`.",
                )
            )
            from nanochat_jax.commands import reports

            reports.print_plan(self, config)
