"""The models of a sweep whose weights and loss curves are kept, in ``models/`` of the run folder.

Of every configuration the first seed, of tuning runs and of large models none. They leave the process that trained them
as a part of their row, which the driver takes out before the row is written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from moesaic.bench.plan import InputError, PlannedRun, Row, is_large

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moesaic.moe import TrainResult

Kept: TypeAlias = "dict[str, NDArray[np.float32]]"
"""``losses`` (steps,), the loss of every training batch, and the parameters of `moesaic.moe.ToyModel` without their
first dimension; of a model that failed or has more than `MAX_NUMBERS` weights the losses alone."""

FOLDER = "models"
MODEL = "_model"
"""The key of a row that holds its `Kept` until the driver has taken it out."""
MAX_KEPT = 256
"""Most models that a stage of a sweep keeps: of more configurations, that many at equal distances in the plan."""
MAX_NUMBERS = 1 << 15
"""Most weights of an encoder that is kept, 128 KiB."""


def mark_kept(planned: Sequence[PlannedRun]) -> list[PlannedRun]:
    """``planned`` with ``keep`` set for the first seed of every configuration, of at most `MAX_KEPT`."""
    first: dict[object, int] = {}
    for i, item in enumerate(planned):
        if item.labels.get("stage") != "tune" and not is_large(item.run):
            run = item.run
            first.setdefault((run.toy, run.features, run.training), i)
    candidates = list(first.values())
    chosen = {candidates[i * len(candidates) // MAX_KEPT] for i in range(MAX_KEPT)} if candidates else set()
    return [replace(item, keep=True) if i in chosen else item for i, item in enumerate(planned)]


def kept_of(result: TrainResult, index: int, *, finished: bool) -> Kept:
    """What is kept of model ``index`` of a trained stack: of one that is not ``finished`` no weights, which are NaN."""
    import numpy as np

    arrays = {"losses": result.losses[index].float().numpy()}
    if finished and result.model.weight[index].numel() <= MAX_NUMBERS:
        arrays |= {name: value[index].detach().cpu().numpy() for name, value in result.model.named_parameters()}
    return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}


def take_out(row: Mapping[str, object]) -> tuple[Row, bytes | None]:
    """A row without its model, and the file that holds the model, None where the row brought none."""
    plain = dict(row)
    model = plain.pop(MODEL, None)
    if not isinstance(model, dict):
        return plain, None
    import numpy as np
    from safetensors.numpy import save

    return plain, save({name: np.asarray(array) for name, array in model.items()})


def path_of(folder: Path, run_key: str) -> Path:
    """Where a run's model is kept."""
    return folder / FOLDER / f"{run_key}.safetensors"


def load_kept(folder: Path, run_key: str) -> Kept | None:
    """What was kept of a run, or None where nothing was.

    Raises:
        InputError: the file is damaged.
    """
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = path_of(folder, run_key)
    if not path.exists():
        return None
    try:
        return {name: np.asarray(array, dtype=np.float32) for name, array in load_file(os.fspath(path)).items()}
    except SafetensorError as error:
        raise InputError(f"{path} is damaged; remove it: {error}") from error
