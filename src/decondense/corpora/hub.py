"""Data sets on the hub or in its format: identified by revision, opened, and read row by row.

A data set is a hub id ``OWNER/NAME``, a local directory that :func:`datasets.load_dataset` reads, or one that
``save_to_disk`` wrote. It is either loaded as a whole (memory-mapped) or streamed; both give the same rows in the same
order. Code that comes with a data set is never run.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from decondense.checkpoints import first_line
from decondense.config import suggest
from decondense.corpora.columns import NULL, PassageError, choose_column, kind_of_value
from decondense.corpora.directories import data_files, is_saved
from decondense.corpora.files import kind_of, kind_of_arrow
from decondense.hashing import hash_file

TIMEOUT = 8.0
"""Seconds after which a hub that does not answer counts as unreachable."""
_HEAD = 1000
"""Rows that are inspected to distinguish documents from the lines of documents."""
_TYPED = 100
"""Rows that are inspected to infer the types of a stream that does not declare them."""
_BATCH = 64  # rows fetched at once: a row may be a whole book
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# an article's heading in WikiText; headings of sections have two or more signs on each side
_TITLE = re.compile(r" ?= (?!=)\S(.*\S)?(?<!=) = ?\n?")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form ``OWNER/NAME`` and not the suffix of a text file."""
    return _ID.fullmatch(name) is not None and not kind_of(Path(name))


def files_hash(files: Iterable[Path], root: Path) -> str:
    """Names and contents of files as a revision, ``files:`` and 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()}\0{hash_file(file)}\n".encode())
    return f"files:{digest.hexdigest()[:16]}"


@dataclass(frozen=True)
class HubSource:
    """A data set, not yet opened, with its revision if the hub can be reached."""

    name: str
    subset: str | None
    split: str
    revision: str | None
    """Commit on the hub, or the hash of local files; None: the hub cannot be reached."""
    unreachable: str | None
    """Why the hub cannot be reached."""
    remedy: str
    """The remedy without network, for messages."""

    @property
    def local(self) -> bool:
        """Whether the data set is a directory."""
        return Path(self.name).exists()

    @property
    def label(self) -> str:
        """The data set in messages."""
        return self.name + (f":{self.subset}" if self.subset else "")


@dataclass(frozen=True)
class HubRows:
    """One column of text of an opened data set."""

    data: Any
    column: str
    revision: str
    count: int | None
    """Rows of the split; None: a stream of unknown length."""
    label: str

    def __iter__(self) -> Iterator[str]:
        count = 0
        batches = iter(self.data.iter(batch_size=_BATCH))
        while True:
            try:
                values = next(batches)[self.column]
            except StopIteration:
                return
            except Exception as error:  # the network, a damaged file, rows of other types
                raise PassageError(f"{self.label} cannot be read after row {count}: {first_line(error)}.") from error
            count += len(values)
            yield from (value or "" for value in values)


class Column(Sequence[str]):
    """The rows of a loaded data set, fetched on access: wikitext-103 has 1.8 million.

    A row without text (null) is an empty string. Empty rows stay, because the published protocol draws among all rows.
    """

    def __init__(self, rows: HubRows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows.data)

    def __getitem__(self, index: Any) -> Any:
        text = self._rows.data[index][self._rows.column]
        return [value or "" for value in text] if isinstance(index, slice) else text or ""

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)


def find(name: str, subset: str | None, split: str, *, remedy: str) -> HubSource:
    """Determine the revision of a data set without reading it.

    Raises:
        PassageError: the hub answers that it has no such data set.
    """
    path = Path(name)
    if path.exists():
        return HubSource(name, subset, split, files_hash(data_files(path), path), None, remedy)
    revision, reason = commit_of(name, "dataset")
    return HubSource(name, subset, split, revision, reason, remedy)


def open_rows(source: HubSource, field: str | None, *, streaming: bool = False) -> HubRows:
    """Open a data set of the hub, or the library's cached copy if the hub cannot be reached.

    Args:
        source: from :func:`find`.
        field: column that holds the text; None: see :func:`~decondense.corpora.columns.choose_column`.
        streaming: read rows over the network instead of downloading the data set first.

    Raises:
        PassageError: the data set cannot be reached, or has no such subset, split or field.
    """
    data = _from_disk(source) if source.local and is_saved(Path(source.name)) else _load(source, streaming)
    column = choose_column(_kinds(data, source), field, source.label)
    count = getattr(data, "num_rows", None)
    if count is None and (known := (data.info.splits or {}).get(source.split)) is not None:
        count = known.num_examples or None
    return HubRows(data.select_columns([column]), column, source.revision or _fingerprint(data), count, source.label)


def _kinds(data: Any, source: HubSource) -> dict[str, str]:
    """Name -> kind of the columns of a data set."""
    import datasets

    if data.features is not None:
        return {
            # a class label has the type of a string and is stored as a number
            name: kind_of_arrow(kind.pa_type) if isinstance(kind, datasets.Value) else type(kind).__name__
            for name, kind in data.features.items()
        }
    kinds: dict[str, str] = {}  # a stream whose files declare no types: the first rows decide
    try:
        for row in islice(iter(data), _TYPED):
            kinds |= {name: kind_of_value(value) for name, value in row.items() if kinds.get(name, NULL) == NULL}
            if NULL not in kinds.values():
                break
    except Exception as error:
        raise PassageError(f"{source.label} cannot be read: {first_line(error)}.") from error
    if not kinds:
        raise PassageError(f"{source.label} has no rows in its split {source.split!r}.")
    return kinds


def _fingerprint(data: Any) -> str:
    """Revision of a data set in the library's cache: its folder is named after the commit."""
    for file in getattr(data, "cache_files", None) or ():
        if _COMMIT.fullmatch(folder := Path(file["filename"]).parent.name):
            return folder
    return f"fingerprint:{data._fingerprint}"


def commit_of(name: str, kind: Literal["dataset", "model"]) -> tuple[str | None, str | None]:
    """The current commit of a data set or model on the hub, or None and the reason why it cannot be determined.

    Without network access, the libraries retry five times over half a minute. This function sends one request, in a
    thread, because no time limit holds for a name server that does not answer.

    Raises:
        PassageError: the hub answers that it has no such data set or model.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if datasets.config.HF_HUB_OFFLINE:
        return None, "offline mode is on (HF_HUB_OFFLINE, HF_DATASETS_OFFLINE)"
    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT).sha)
        except Exception as error:  # the hub client raises a dozen unrelated types
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT + 1)
    if not answer:
        return None, f"no answer within {TIMEOUT:.0f} seconds"
    (commit,) = answer
    if isinstance(commit, RepositoryNotFoundError):
        noun = "data set" if kind == "dataset" else "model"
        raise PassageError(
            f"the hub has no {noun} {name!r} that you may read, and there is no local file or directory of this name; "
            "check the spelling, or log in with a token that has access (HF_TOKEN)."
        )
    return (None, first_line(commit)) if isinstance(commit, Exception) else (commit, None)


@contextmanager
def offline() -> Iterator[None]:
    """Keep the libraries from contacting a hub that cannot be reached."""
    import datasets
    import huggingface_hub.constants as constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _load(source: HubSource, streaming: bool) -> Any:
    import datasets

    more = {} if source.local or source.revision is None else {"revision": source.revision}
    if source.unreachable is not None:
        try:
            with offline():
                # the cache holds whole data sets: streaming has no use
                return datasets.load_dataset(source.name, source.subset, split=source.split, trust_remote_code=False)
        except Exception as error:  # the library raises a dozen unrelated types
            raise PassageError(
                f"the data set {source.label} (split {source.split}) cannot be loaded: the hub cannot be reached "
                f"({source.unreachable}), the cache holds no such data set, and there is no local file or directory "
                f"of this name. {source.remedy}"
            ) from error
    try:
        return datasets.load_dataset(
            source.name, source.subset, split=source.split, streaming=streaming, trust_remote_code=False, **more
        )
    except Exception as error:
        raise PassageError(_explained(source, error, more)) from error


def _explained(source: HubSource, error: Exception, more: dict[str, str]) -> str:
    """The message for an existing data set that does not load: a wrong subset or split, or the library's error."""
    import datasets

    if "trust_remote_code" in str(error):  # asking for its subsets would ask whether its code may run
        return f"the data set {source.label} cannot be loaded: it contains custom code, which is not run here."
    # only releases that can run a script beside the data have this option
    known = inspect.signature(datasets.load_dataset_builder).parameters
    never: dict[str, Any] = {"trust_remote_code": False} if "trust_remote_code" in known else {}
    try:
        subsets = datasets.get_dataset_config_names(source.name, **never, **more)
        if source.subset is None and len(subsets) > 1 and "default" not in subsets and "onfig" in str(error):
            named = ", ".join(f"{source.name}:{subset}" for subset in subsets)
            return f"{source.name} has several subsets. Name one (corpus.subset in a study): {named}."
        if source.subset is not None and source.subset not in subsets:
            hint = suggest(source.subset, subsets)
            return f"{source.name} has no subset {source.subset!r}.{hint} It has: {', '.join(subsets)}."
        splits = datasets.get_dataset_split_names(source.name, source.subset, **never, **more)
        if re.split(r"[\[+(]", source.split)[0] not in splits:
            hint = suggest(source.split, splits)
            return f"{source.label} has no split {source.split!r}.{hint} It has: {', '.join(map(str, splits))}."
    except Exception:
        pass  # its subsets cannot be read either; the first error has the reason
    return f"the data set {source.label} (split {source.split}) cannot be loaded: {first_line(error)}." + (
        "" if source.local else f" {source.remedy}"
    )


def _from_disk(source: HubSource) -> Any:
    import datasets

    if source.subset is not None:
        raise PassageError(
            f"{source.name} was written by save_to_disk and has no subset {source.subset!r}; omit subset."
        )
    try:
        data = datasets.load_from_disk(source.name)
    except Exception as error:
        raise PassageError(f"{source.name} cannot be loaded as a data set: {first_line(error)}.") from error
    if isinstance(data, datasets.DatasetDict):
        if source.split not in data:
            hint = suggest(source.split, data)
            raise PassageError(f"{source.name} has no split {source.split!r}.{hint} It has: {', '.join(data)}.")
        return data[source.split]
    # a single split; "train" is the default
    if source.split not in ("train", str(data.split)):
        raise PassageError(f"{source.name} has no split {source.split!r}: it is a single unnamed split; omit split.")
    return data


def join_articles(rows: Iterable[str]) -> Iterator[str]:
    """The documents of a data set: its rows, or the articles if the rows are lines of articles (Salesforce/wikitext).

    Rows are lines if, among the first thousand, none has a line break except at its end, most of the non-empty ones end
    with one or a tenth of all are empty, and there is a heading `` = Title = ``, with one sign on each side, after an
    empty row (or at the start). Every such heading then begins a document.
    """
    rest = iter(rows)
    head: list[str] = []
    for row in rest:
        head.append(row)
        if "\n" in row[:-1] or len(head) == _HEAD:
            break
    everything = chain(head, rest)
    return _joined(everything) if _are_lines(head) else everything


def _are_lines(head: Sequence[str]) -> bool:
    if any("\n" in row[:-1] for row in head):
        return False
    filled = [row for row in head if row.strip()]
    ended = sum(row.endswith("\n") for row in filled)
    if 2 * ended <= len(filled) and 10 * (len(head) - len(filled)) < len(head):
        return False
    return any(_TITLE.fullmatch(row) and not before.strip() for before, row in zip(["", *head], head, strict=False))


def _joined(rows: Iterable[str]) -> Iterator[str]:
    article: list[str] = []
    before = ""
    for row in rows:
        if article and not before.strip() and _TITLE.fullmatch(row):
            if (text := "".join(article)).strip():
                yield text
            article = []
        article.append(row if row.endswith("\n") else row + "\n")
        before = row
    yield "".join(article)
