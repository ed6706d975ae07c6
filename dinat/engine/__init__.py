"""Training and evaluation. Takes configurations as OmegaConf objects; knows nothing of Hydra."""

from dinat.engine.evaluation import evaluate
from dinat.engine.training import Interrupted, train

__all__ = ["Interrupted", "evaluate", "train"]
