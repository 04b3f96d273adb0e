"""The commented example that ``moesaic sweep --init FILE`` writes."""

from __future__ import annotations

from pathlib import Path

from moesaic.bench.plan import InputError

EXAMPLE = """\
# A sweep: every run below is trained and measured into one run folder. It runs as it is, in about a minute or two
# on a laptop. Fields and their meaning: help(moesaic.moe.ToyConfig), FeatureConfig and TrainConfig.

seeds = 3                               # 0, 1, 2; or a list, such as [7, 11]
where = ["n_experts * n_hidden == 32"]  # only runs of which this is true; several conditions must all be true

[run]                                   # one value for all runs
n_features = 64
features = "independent"                # independent, power_law, correlated, anticorrelated, clustered, exactly_k
gate = "switch"                         # paper, switch, sigmoid, straight_through, random, oracle
parametrization = "small"
steps = 1000
batch_size = 256
schedule = "cosine"
reduction = "sum"

[grid]                                  # every combination of these
n_experts = [1, 4, 16]
n_hidden = [2, 8, 32]
feature_probability = { log = [0.03, 0.3], n = 2 }  # n values evenly in the logarithm; { linear = [a, b], n = k } too
lr = [0.003, 0.01]

# [zip]                                 # lists of one length, walked together and not combined
# weight_decay = [0.0, 0.01]
# beta2 = [0.99, 0.999]

[match]                                 # for every mixture the dense run that is nearest to it in
to = ["active_flops", "parameters"]     # total_width, active_width, parameters, active_flops, bytes, wall (measured)
"""


def write_example(path: Path) -> None:
    """Write the example to a file that is not there yet.

    Raises:
        InputError: it is there, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(EXAMPLE)
    except FileExistsError as error:
        raise InputError(f"--init {path}: is there already; name another file") from error
    except OSError as error:
        raise InputError(f"--init {path}: cannot be written: {error.strerror or error}") from error
