"""Routers, experts, layers, toy models and their training: what is trained."""

from typing import TYPE_CHECKING, Any

from moesaic.moe.config import FeatureConfig as FeatureConfig
from moesaic.moe.config import Run as Run
from moesaic.moe.config import ToyConfig as ToyConfig
from moesaic.moe.config import TrainConfig as TrainConfig
from moesaic.moe.data import feature_probabilities as feature_probabilities
from moesaic.moe.data import held_out as held_out
from moesaic.moe.data import importance as importance
from moesaic.moe.large import LargeResult as LargeResult
from moesaic.moe.large import train_large as train_large
from moesaic.moe.large_evaluation import LargeEvaluation as LargeEvaluation
from moesaic.moe.large_evaluation import evaluate_large as evaluate_large
from moesaic.moe.layer import LayerRouting as LayerRouting
from moesaic.moe.layer import MoE as MoE
from moesaic.moe.parallel_training import clip_gradients as clip_gradients
from moesaic.moe.parallel_training import parameter_groups as parameter_groups
from moesaic.moe.parallel_training import reduce_gradients as reduce_gradients
from moesaic.moe.toy import ToyModel as ToyModel
from moesaic.moe.toy import ToyRouting as ToyRouting
from moesaic.moe.trainer import TrainResult as TrainResult
from moesaic.moe.trainer import TrainStep as TrainStep
from moesaic.moe.trainer import train as train
from moesaic.moe.trainer import train_runs as train_runs

if TYPE_CHECKING:
    from moesaic.moe.hf import register_with_transformers as register_with_transformers


def __getattr__(name: str) -> Any:
    # What it marks for torch.compile loads the compiler, two seconds that toy models and the command line do not need.
    if name == "register_with_transformers":
        from moesaic.moe.hf import register_with_transformers

        return register_with_transformers
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "register_with_transformers"])
