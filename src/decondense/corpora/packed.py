r"""From documents to token sequences: the split, the tokenizer and the order are each identified by a hash.

A corpus is prepared once into a cache directory (tokenizer, memory-mapped tokens, document boundaries, a manifest with
the hash of each) and then read by every run. The hash of a document's text decides whether it is held out, so adding
documents never moves one to the other split.

Preparation holds one batch of documents and all identities in memory, so a text may be larger than memory. Tokens are
appended to files in a staging folder, which is renamed when it is complete.
"""

from __future__ import annotations

import errno
import hashlib
import heapq
import json
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from decondense.checkpoints import reason_of
from decondense.config import ConfigError, CorpusConfig
from decondense.corpora import hub
from decondense.corpora.columns import TextWarning
from decondense.corpora.embedded import Document, Progress, cache_directory
from decondense.corpora.sources import END, Dropped, Source, documents_of, find_source
from decondense.hashing import hash_file
from decondense.locks import lock
from decondense.records import RecordError, read_json
from decondense.seeding import derive
from decondense.tokenizers import read_tokenizer, vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_TEXT = 12_000_000
"""Characters of training text for the BPE merges; more text changes few of 4096 entries and costs seconds."""
_BATCH = 256
"""Documents that are tokenised at once."""
_BATCH_CHARACTERS = 2_000_000
"""Characters that are tokenised at once, except for a longer document: each takes a few hundred bytes during this
time."""
_STALE = 60.0
"""Seconds after which a staging folder without a lock is removed: its process was killed."""
_RECIPE = 2  # raise when the code below would prepare other tokens from the same documents
_FILES = [f"{split}{end}" for split in ("train", "held_out") for end in (".npy", "_starts.npy", "_names.json")]
"""Files of a prepared corpus besides those of its tokenizer."""

IntArray = np.ndarray[Any, np.dtype[np.integer[Any]]]


@dataclass(frozen=True)
class PackedCorpus:
    """A prepared corpus on disk with memory-mapped token arrays."""

    path: Path
    manifest: dict[str, Any]

    @property
    def content_hash(self) -> str:
        """Hash of tokenizer, tokens and document boundaries of both splits."""
        return str(self.manifest["content_hash"])

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding that the tokenizer needs: its largest id plus 1."""
        return int(self.manifest["vocabulary"])

    @cached_property
    def train_tokens(self) -> IntArray:
        """Token ids of the training split, documents joined by the end-of-text token."""
        return np.load(self.path / "train.npy", mmap_mode="r")  # type: ignore[no-any-return]

    @cached_property
    def held_out_tokens(self) -> IntArray:
        """Token ids of the held-out split."""
        return np.load(self.path / "held_out.npy", mmap_mode="r")  # type: ignore[no-any-return]

    @cached_property
    def held_out_starts(self) -> IntArray:
        """Offsets of the held-out documents, and the end of the last one."""
        return np.load(self.path / "held_out_starts.npy")  # type: ignore[no-any-return]

    @cached_property
    def held_out_names(self) -> list[str]:
        """Identities (content hashes) of the held-out documents."""
        return list(json.loads((self.path / "held_out_names.json").read_text()))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of this corpus, in Hugging Face form."""
        return read_tokenizer(self.path / "tokenizer")

    def sequences(self, length: int) -> int:
        """Number of training sequences of ``length`` tokens; the remainder is not used."""
        return len(self.train_tokens) // length

    def order(self, seed: int, count: int, length: int) -> IntArray:
        """Indices of the ``count`` training sequences of a run with ``seed``, in order: one permutation per epoch.

        Raises:
            ValueError: the training text is shorter than one sequence.
        """
        available = self.sequences(length)
        if available < 1:
            raise ValueError(
                f"the training text holds {len(self.train_tokens)} tokens, fewer than one sequence of {length}; give "
                "more text or a smaller train.max_seq_length."
            )
        epochs = range(-(-count // available))
        generators = (np.random.default_rng(derive(seed, "data order", epoch)) for epoch in epochs)
        return np.concatenate([generator.permutation(available) for generator in generators])[:count]

    def order_hash(self, order: IntArray, length: int) -> str:
        """Hash of the token sequences in the order in which a run reads them."""
        digest = hashlib.sha256(str(length).encode())
        for index in order:
            digest.update(self.sequence(int(index), length).tobytes())
        return digest.hexdigest()[:16]

    def sequence(self, index: int, length: int) -> IntArray:
        """Training sequence ``index``."""
        return np.asarray(self.train_tokens[index * length : (index + 1) * length])

    def held_out_documents(
        self,
        most_tokens: int,
        *,
        least: int = 2,
        part: Literal["validation", "tuning"] = "validation",
        of_one: int | None = None,
    ) -> list[tuple[str, IntArray]]:
        """(identity, token ids) of held-out documents in their fixed order, up to ``most_tokens`` in total.

        The last document is cut where the budget ends, so that every run scores the same tokens; every document is cut
        after ``of_one`` tokens. ``tuning`` takes documents from the end, and none that ``validation`` takes.

        Raises:
            ValueError: no document is left for tuning.
        """
        names = list(enumerate(self.held_out_names))
        if part == "tuning":
            scored = {name for name, _ in self.held_out_documents(most_tokens, least=least, of_one=of_one)}
            names = [(number, name) for number, name in reversed(names) if name not in scored]
        documents: list[tuple[str, IntArray]] = []
        left = most_tokens
        for number, name in names:
            begin, end = self.held_out_starts[number : number + 2]
            ids = np.asarray(self.held_out_tokens[begin : min(end, begin + min(left, of_one or left))])
            if len(ids) >= least:
                documents.append((name, ids))
                left -= len(ids)
            if left < least:
                break
        if not documents and part == "tuning":
            raise ValueError(
                f"validation takes all {len(names) + len(scored)} held-out documents, so none is left to choose a "
                "learning rate on: give more text, a larger corpus.held_out or fewer evaluate.validation_tokens."
            )
        return documents

    def passages(self, count: int, tokens: int) -> IntArray:
        """The first ``tokens`` tokens of the first ``count`` held-out documents that are long enough: [count, tokens].

        Raises:
            ValueError: fewer than ``count`` documents are long enough.
        """
        starts = self.held_out_starts
        long_enough = starts[:-1][np.diff(starts) >= tokens].tolist()
        if len(long_enough) < count:
            raise ValueError(
                f"only {len(long_enough)} held-out documents have {tokens} tokens, but {count} are needed; give more "
                "text, fewer evaluate.passages or shorter evaluate.passage_tokens."
            )
        return np.stack([np.asarray(self.held_out_tokens[begin : begin + tokens]) for begin in long_enough[:count]])


def is_held_out(document: Document, share: float) -> bool:
    """Whether a document is held out, a function of the hash of its text alone."""
    return int(document.identity[:8], 16) / 2**32 < share


def prepare(config: CorpusConfig, *, cache: Path | None = None, progress: Progress | None = None) -> PackedCorpus:
    """Read, split, tokenise and pack a corpus, or load it from the cache.

    A data set on the hub is identified by its commit, so the cache is used without reading the data set again. If the
    hub cannot be reached, the newest corpus prepared from the same data set is used, with a warning.

    Args:
        config: the text and the vocabulary.
        cache: directory of the cache; None: :func:`cache_directory`.
        progress: called as progress(what, done, total).

    Raises:
        ValueError: the source does not exist, cannot be reached, holds no text, or is too short to be split.
    """
    cache = cache or cache_directory()
    source = find_source(config, cache=cache, progress=progress)
    ready = None if config.tokenizer is None else _load_tokenizer(config.tokenizer)
    vocabulary = config.vocab_size if ready is None else ready.backend_tokenizer.to_str()
    key = hashlib.sha256(f"recipe {_RECIPE} {vocabulary} {config.held_out}".encode())
    for part in source.key:
        key.update(part.encode())
    request = key.hexdigest()[:16]
    if source.open is not None:
        if (corpus := _prepared_last(cache / "packed", request)) is not None:
            warnings.warn(
                f"the hub cannot be reached ({source.unreachable}); using the text prepared from {source.name} at "
                f"revision {corpus.manifest['revision']}.",
                stacklevel=2,
            )
            return corpus
        source = source.open()
    if source.revision is not None and not source.revision.startswith("documents:"):
        key.update(source.revision.encode())  # documents are in the key already
    path = cache / "packed" / key.hexdigest()[:16]
    return load(path) or _build(path, source, request, ready, config, progress)


def _prepared_last(folder: Path, request: str) -> PackedCorpus | None:
    """The newest corpus that was prepared for a request, of any revision."""
    prepared = []
    for path in folder.glob("[!.]*/manifest.json"):
        with suppress(OSError, RecordError):
            if read_json(path).get("request") == request:
                prepared.append((path.stat().st_mtime_ns, path.parent))
    return next((corpus for _, path in sorted(prepared, reverse=True) if (corpus := load(path)) is not None), None)


def load(path: Path) -> PackedCorpus | None:
    """A prepared corpus; None if there is none, or its files or its manifest are not what was written."""
    try:
        manifest = read_json(path / "manifest.json")
        files = manifest["files"]
        whole = (
            {*_FILES, "tokenizer/tokenizer.json"} <= files.keys()
            and manifest["content_hash"] == _content_hash(files)
            and "revision" in manifest
            and type(manifest["vocabulary"]) is int
            and all(hash_file(path / name) == expected for name, expected in files.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # also JSON of another shape
        return None
    return PackedCorpus(path, manifest) if whole else None


def _content_hash(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def _load_tokenizer(name: str) -> Any:
    unreachable = None
    try:
        _, unreachable = (None, None) if Path(name).exists() else hub.commit_of(name.partition(":")[0], "model")
        with nullcontext() if unreachable is None else hub.offline():
            tokenizer: Any = read_tokenizer(name)
    except Exception as error:  # loading a tokenizer raises half a dozen types
        reason = f"the hub cannot be reached ({unreachable})" if unreachable else reason_of(error)
        raise ConfigError(
            f"corpus.tokenizer {name!r} cannot be loaded: {reason.rstrip('.')}. Without network access, give a local "
            "directory, or set HF_HOME to a cache that contains it."
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(f"corpus.tokenizer {name!r} has no tokenizer.json; use a fast tokenizer.")
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"corpus.tokenizer {name!r} has no end-of-text token to separate documents; use a tokenizer with an "
            "eos_token."
        )
    return tokenizer


def _build(
    path: Path, source: Source, request: str, ready: Any | None, config: CorpusConfig, progress: Progress | None
) -> PackedCorpus:
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    folder = path.parent / f".{path.name}.{secrets.token_hex(6)}"
    folder.mkdir()  # tempfile's are private, and a cache may be shared
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle, folder)  # released when this process ends, even if it is killed
        dropped = Dropped()
        documents = documents_of(source, config, "reading" if ready is None else "tokenising", progress, dropped)
        if ready is None:
            # read once and stored on disk: the vocabulary must be learnt before the first token is written
            spool = folder / "text.jsonl"
            count, sample = _spooled(documents, spool, config.held_out)
            if not sample:
                raise _too_few(config, 0, count)
            report = progress or (lambda what, done, total: None)
            report("learning the vocabulary", 0, 1)
            ready = _train_tokenizer(sample, config.vocab_size)
            report("learning the vocabulary", 1, 1)
            documents = _unspooled(spool, count, report)
        ready.save_pretrained(folder / "tokenizer")
        files = sorted(f"tokenizer/{item.name}" for item in (folder / "tokenizer").iterdir())
        counts = _pack(ready, documents, folder, config.held_out)
        if not counts["train_documents"] or not counts["held_out_documents"]:
            raise _too_few(config, counts["train_documents"], counts["held_out_documents"])
        (folder / "text.jsonl").unlink(missing_ok=True)
        hashes = {name: hash_file(folder / name) for name in [*files, *_FILES]}
        manifest = {
            "config": config.model_dump(mode="json"),
            "source": source.name,
            "revision": source.revision,
            "request": request,
            "content_hash": _content_hash(hashes),
            "vocabulary": vocabulary_of(ready),
            "documents": counts["train_documents"] + counts["held_out_documents"],
            **counts,
            "empty_documents": dropped.empty,
            "repeated_documents": dropped.repeated,
            "files": hashes,
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
        _install(folder, path)
        if dropped.empty:
            warnings.warn(
                f"corpus.source {source.name!r}: {dropped.empty:,} records hold no text and are skipped.",
                TextWarning,
                stacklevel=2,
            )
        prepared = load(path)
        assert prepared is not None, f"a corpus just written to {path} must load"
        return prepared
    except OSError as error:
        if error.filename is not None:
            raise
        # a full disk does not say which one it is; numpy says "requested and written" without a number
        reason = error.strerror or f"could not be written ({error}); the disk may be full"
        raise OSError(error.errno or errno.ENOSPC, reason, str(path)) from error
    finally:
        os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


def _install(folder: Path, path: Path) -> None:
    """Move a whole corpus to its place, unless another process was first; a damaged one there is replaced."""
    for _ in range(3):
        try:
            os.rename(folder, path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        if load(path) is not None:
            return
        shutil.rmtree(path, ignore_errors=True)
    raise ConfigError(
        f"{path} is damaged or unreadable, and cannot be replaced (does it belong to another user?). Remove it, or set "
        "DECONDENSE_CACHE to your own directory."
    )


def _too_few(config: CorpusConfig, train: int, held_out: int) -> ValueError:
    return ValueError(
        f"the text of {config.source!r} has {train + held_out} documents, too few to hold {config.held_out:.0%} "
        f"of them out ({train} to train on, {held_out} held out). Give more documents: one file each, or "
        f"separated by a line {END}{'' if config.max_characters is None else ', or raise corpus.max_characters'}."
    )


def _sweep(folder: Path) -> None:
    """Remove the staging folders of killed processes: those without a lock."""
    for staging in folder.glob(".*.*"):
        with suppress(OSError), ExitStack() as stack:
            if time.time() - staging.stat().st_mtime < _STALE:
                continue  # its owner may be about to lock it
            handle = os.open(staging, os.O_RDONLY)
            stack.callback(os.close, handle)
            lock(handle, staging)
            shutil.rmtree(staging, ignore_errors=True)


def _spooled(documents: Iterable[Document], path: Path, share: float) -> tuple[int, list[str]]:
    """Write the texts to disk; return their number, and a sample of training texts for the vocabulary.

    The sample is those texts with the smallest hashes that have enough characters: random and reproducible.
    """
    chosen: list[tuple[int, str]] = []  # a heap, the greatest hash first
    count = characters = 0
    with path.open("w", encoding="utf-8") as stream:
        for document in documents:
            count += 1
            stream.write(json.dumps(document.text) + "\n")
            if is_held_out(document, share):
                continue
            heapq.heappush(chosen, (-int(document.identity[::-1], 16), document.text))
            characters += len(document.text)
            while characters - len(chosen[0][1]) >= _TOKENIZER_TEXT:
                characters -= len(heapq.heappop(chosen)[1])
    return count, [text for _, text in sorted(chosen, reverse=True)]


def _unspooled(path: Path, count: int, progress: Progress) -> Iterator[Document]:
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            yield Document("", json.loads(line))
            if number % _BATCH == 0 or number == count:
                progress("tokenising (documents)", number, count)


def _train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END
    )


def _pack(tokenizer: Any, documents: Iterable[Document], folder: Path, share: float) -> dict[str, int]:
    """Write the tokens, starts and names of both splits, document by document; return the counts of the manifest."""
    backend, end = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    backend.no_truncation()  # some tokenizers truncate at the length of their model
    backend.no_padding()
    kind = np.dtype(np.uint16 if vocabulary_of(tokenizer) <= 2**16 else np.uint32)
    held_out: list[tuple[str, int, int]] = []
    characters = train_documents = train_tokens = held_out_tokens = 0
    with (
        (folder / "train.raw").open("wb") as tokens,
        (folder / "train_starts.raw").open("wb") as starts,
        (folder / "train_names.json").open("w") as names,
        (folder / "unsorted.raw").open("wb") as unsorted,
    ):
        starts.write(np.int64(0).tobytes())
        names.write("[")
        for batch in _batches(documents):
            texts = [document.text for document in batch]
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
            for document, encoding in zip(batch, encodings, strict=True):
                ids = np.asarray([*encoding.ids, end], dtype=kind)
                characters += len(document.text)
                if is_held_out(document, share):
                    held_out.append((document.identity, held_out_tokens, len(ids)))
                    held_out_tokens += unsorted.write(ids.tobytes()) // kind.itemsize
                else:
                    names.write(f'{", " if train_documents else ""}"{document.identity}"')
                    train_documents += 1
                    train_tokens += tokens.write(ids.tobytes()) // kind.itemsize
                    starts.write(np.int64(train_tokens).tobytes())
        names.write("]")
    _saved(folder / "train.raw", kind)
    _saved(folder / "train_starts.raw", np.dtype(np.int64))
    # sorted by identity, so that a budget of held-out tokens takes a random part of the source and not the first one
    held_out.sort()
    np.save(folder / "held_out_starts.npy", np.cumsum([0, *(length for _, _, length in held_out)], dtype=np.int64))
    (folder / "held_out_names.json").write_text(json.dumps([name for name, _, _ in held_out]))
    unsorted_path = _saved(folder / "unsorted.raw", kind)
    unsorted_tokens = np.load(unsorted_path, mmap_mode="r")
    with (folder / "held_out.raw").open("wb") as tokens:
        for _, begin, length in held_out:
            tokens.write(unsorted_tokens[begin : begin + length].tobytes())
    _saved(folder / "held_out.raw", kind)
    unsorted_path.unlink()
    return {
        "train_documents": train_documents,
        "held_out_documents": len(held_out),
        "train_tokens": train_tokens,
        "held_out_tokens": held_out_tokens,
        "characters": characters,
    }


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _saved(raw: Path, kind: np.dtype[Any]) -> Path:
    """Convert a file of raw values to ``.npy``, in bounded memory."""
    path = raw.with_suffix(".npy")
    np.save(path, np.memmap(raw, kind, mode="r") if raw.stat().st_size else np.empty(0, kind))
    raw.unlink()
    return path
