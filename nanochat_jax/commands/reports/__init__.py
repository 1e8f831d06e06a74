"""What commands print about a machine or a run, and compute for it with JAX.

diagnosis    faults of this machine and its installation
plan_report  the plan of a run, as text or as one JSON object
"""

from nanochat_jax.commands.reports import diagnosis as diagnosis
from nanochat_jax.commands.reports.plan_report import print_plan as print_plan
