"""What models can do: tasks for trained runs, and tasks on which small models are trained.

Of a trained run, which a `Reader` (reader.py) reads texts with: `lm` (how well it predicts),
`needle` (what it finds in a long text), `harness` (the tasks of lm-evaluation-harness).

Of small models: `TASKS` has generated tasks by name; `Evaluation` trains models of presets on one.
"""

from hope.evaluate.evaluation import Evaluation, accuracy, equal_sized, load_evaluation, table
from hope.evaluate.mad import MAD_TASKS
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

TASKS: dict[str, Task] = {task.name: task for task in (Recall(), StateTracking(), *MAD_TASKS)}
