"""The process in which the lm-evaluation-harness runs: started through :mod:`decondense.lifeline`.

It reads ``OUT/.request.json``, writes one line per event to ``OUT/.events.jsonl`` and one file per finished task to
``OUT/tasks``. Prompts, scoring and aggregation are the harness's own, on local data and on the hub's: only the rows of
the data set and, for local files without a training split, the split of the examples are replaced.
"""
