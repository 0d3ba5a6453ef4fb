"""Tasks on real data: what `macrobatch train` and `macrobatch compare` train, and how to bring your own."""

from macrobatch.tasks.load import load_task, parse_task_option, task_names
from macrobatch.tasks.task import Task

__all__ = ["Task", "load_task", "parse_task_option", "task_names"]
