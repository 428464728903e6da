"""What models can do in context: tasks that are generated, on which small models are trained.

`TASKS` has them by name, one file each; `Evaluation` trains models of presets on one.
"""

from hope.evaluate.evaluation import Evaluation, accuracy, equal_sized, load_evaluation, table
from hope.evaluate.recall import Recall
from hope.evaluate.state_tracking import StateTracking
from hope.evaluate.task import IGNORED, Task

__all__ = [
    "IGNORED",
    "TASKS",
    "Evaluation",
    "Recall",
    "StateTracking",
    "Task",
    "accuracy",
    "equal_sized",
    "load_evaluation",
    "table",
]

TASKS: dict[str, Task] = {task.name: task for task in (Recall(), StateTracking())}
