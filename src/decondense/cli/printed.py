"""``--json``: one object on standard output and nothing else there; progress and tables go to standard error.

Keys are stable: within one :data:`SCHEMA_VERSION` they may be added, and are never renamed or given another meaning.
:data:`KEYS` is their one home; the page ``docs/json.md`` is made from it (``python -m decondense.cli.printed``).
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import typer

SCHEMA_VERSION = 1

_EVERY = {"schema_version": "version of this format", "command": "the verb"}
_REPORT = {
    "report": "path of report.html, or null",
    "figures": "directory of the figures",
    "rows": "file of rows",
    "comparison": "what `compare --json` prints, or null where nothing can be compared",
    "problems": "why there is no comparison, as sentences",
    "failed": "runs that failed: `arm`, `seed`, `error`",
}
KEYS: dict[str, dict[str, str]] = {
    "measure": {
        "results": "directory of the files",
        "models": "one object per model, in the order of the arguments: the keys of `profile.json`'s `summary` and",
        "models[].label": "short name",
        "models[].folder": "directory of its files",
        "models[].step": "training step of a checkpoint, or null",
        "models[].verdict": "how condensed: `level`, ... (`decondense.atlas.Verdict`)",
        "models[].layers": "names of the L + 1 layers",
        "models[].mean_cosine": "mean cosine of each layer",
        "models[].mean_cosine_interval": "95 % interval of each, over passages",
        "models[].spearman": "rank correlation of mean cosine with depth; so is `kendall`; `_interval`: 95 % interval",
        "models[].last": "mean of the last 1 to 5 layers' mean cosines, and of the deep `half`",
        "models[].metrics": "side metrics by name, one value per layer",
        "models[].sinks": "sink tokens: `rule`, `layers` (passages, tokens, positions), the numbers `_without` them",
        "models[].all_layers": "every measured state: `mean_cosine`, `norm`",
        "models[].info": "what was measured: model, parameters, source, ...",
    },
    "evaluate": {
        "model": "the model as it was named",
        "results": "directory of the files",
        "scores": "one object per task and metric: `task`, `metric`, `value`, `stderr`, `n`, `shots`, ...",
        "notes": "notes that qualify the scores, as in every table",
    },
    "compare": {"...": "the fields of `decondense.compare.Comparison`, by name"},
    "report": _REPORT,
    "demo": _REPORT,
    "study": _REPORT,
    "study --dry-run": {
        "study": "name",
        "scale": "its scale",
        "title": "the question that it answers, in one line",
        "fingerprint": "first 16 digits of the hash of its configuration",
        "workers": "runs in parallel",
        "runs": "number of runs",
        "tokens": "tokens of all runs",
        "flops": "operations of all runs whose model is known",
        "seconds": "time of the timed runs, with the workers in parallel",
        "disk_bytes": "disk for the trained models and checkpoints: `final`, `checkpoints`",
        "lines": "one object per line of the printed plan, by column",
        "notes": "what the plan says in addition to the table",
        "commands": "ways to start it: `title`, `lines`",
    },
}


def emit(command: str, **values: Any) -> None:
    """Print the JSON object of a verb; numbers that are not finite become null."""
    head = {"schema_version": SCHEMA_VERSION, "command": command.split()[0]}
    asked = {key for key in KEYS[command] if "[" not in key and key != "..."}
    assert "..." in KEYS[command] or set(values) == asked, (sorted(values), sorted(asked))
    text = json.dumps(_finite({**head, **values}), ensure_ascii=False, allow_nan=False, indent=1)
    # json escapes the control characters below space, but a terminal obeys these too
    typer.echo(re.sub("[\x7f-\x9f]", lambda match: f"\\u{ord(match[0]):04x}", text))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def page() -> str:
    """The text of ``docs/json.md``."""
    parts = [
        "# Output for programs",
        "`--json` prints one JSON object on standard output and nothing else there; tables, progress and notes go to\n"
        "standard error, and the exit status is the same. Keys are stable: within one `schema_version` they may be\n"
        f"added, and are never renamed or given another meaning. This is version {SCHEMA_VERSION}. Numbers that are "
        "not finite are null.\n`decondense env` always prints JSON.",
        "```sh\ndecondense measure path/to/model --json > measured.json\n"
        "decondense study fig2 --dry-run --json | jq .seconds\n```",
        _table("Every object", _EVERY),
        *(_table(f"`{command} --json`", keys) for command, keys in KEYS.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _table(title: str, keys: dict[str, str]) -> str:
    lines = [f"| `{key}` | {meaning} |" if key != "..." else f"| ... | {meaning} |" for key, meaning in keys.items()]
    return "\n".join([f"## {title}", "", "| key | meaning |", "| --- | --- |", *lines])


if __name__ == "__main__":
    typer.echo(page(), nl=False)
