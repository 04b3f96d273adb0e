"""What is run: the command line, sweeps and their run folders, reproductions and reports."""

from moesaic.bench.spec import SweepSpec as SweepSpec
from moesaic.bench.sweep import SweepResult as SweepResult
from moesaic.bench.sweep import run_sweep as run_sweep
