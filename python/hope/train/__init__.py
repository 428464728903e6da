"""Training: a run's loop and its parts, one idea in each file.

schedule: the learning rate. optimizer: parameter groups. validation: what a model is judged by.
metrics: where numbers go. divergence: what is said when they are no numbers any more. signals:
stopping. trainer: the loop around them.
"""

from hope.train.divergence import TrainingDiverged
from hope.train.optimizer import make_optimizer
from hope.train.schedule import learning_rate
from hope.train.trainer import Trainer, TrainResult, discard
from hope.train.validation import autocast, bits_per_byte, target_bytes

__all__ = [
    "TrainResult",
    "Trainer",
    "TrainingDiverged",
    "autocast",
    "bits_per_byte",
    "discard",
    "learning_rate",
    "make_optimizer",
    "target_bytes",
]
