"""The common tasks by name: what counts as the output, how it is weighed, what it is measured by.

A task gives a run its measure and its loss where the user gives none. The measures are those of
torchmetrics, an optional extra; classification needs none of it, since accuracy is measured here.
"""

from compress.tasks.boxes import DETECTION
from compress.tasks.labels import MULTILABEL
from compress.tasks.masks import SEGMENTATION
from compress.tasks.outputs import read_for
from compress.tasks.pictures import RESTORATION
from compress.tasks.record import Measure, Scorer, Setup, Task, TaskMeasure
from compress.tasks.values import REGRESSION

# Classification is not among them: accuracy is what everything is measured by without a task.
TASKS = {task.name: task for task in (MULTILABEL, REGRESSION, SEGMENTATION, DETECTION, RESTORATION)}

__all__ = ["TASKS", "Measure", "Scorer", "Setup", "Task", "TaskMeasure", "read_for"]
