r"""Documents to token sequences: one split, one tokenizer, one order, all of them named by hashes.

A corpus is prepared once into a cache directory (tokenizer, memory-mapped tokens, document boundaries, a manifest with
the hash of each) and then read by every run. The held-out documents are chosen by the hash of their own text, so a
document stays on its side when others are added.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from decondense.config import ConfigError, CorpusConfig
from decondense.corpora.embedded import Document, Progress, cache_directory, python_docs
from decondense.seeding import derive

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = "<|endoftext|>"
_TOKENIZER_TEXT = 12_000_000
"""Characters of training text the BPE merges are learnt from; more changes few of 4096 entries and costs seconds."""
_PIECE = 4_000
"""Characters after which an undivided text file is cut at the next paragraph."""
_RECIPE = 2  # raise when the code below would prepare other tokens from the same documents

IntArray = np.ndarray[Any, np.dtype[np.integer[Any]]]


@dataclass(frozen=True)
class PackedCorpus:
    """A prepared corpus on disk. Token arrays are memory-mapped and never held in memory as a whole."""

    path: Path
    manifest: dict[str, Any]

    @property
    def content_hash(self) -> str:
        """Hash of tokenizer, tokens and document boundaries of both splits."""
        return str(self.manifest["content_hash"])

    @property
    def vocabulary(self) -> int:
        """Number of entries of the tokenizer."""
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
        from transformers import AutoTokenizer

        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.path / "tokenizer")
        return found

    def sequences(self, length: int) -> int:
        """Whole training sequences of ``length`` tokens; the rest at the end is not used."""
        return len(self.train_tokens) // length

    def order(self, seed: int, count: int, length: int) -> IntArray:
        """Which ``count`` training sequences a run with ``seed`` reads, in order: one permutation after the other.

        Raises:
            ValueError: the training text holds no single sequence of ``length`` tokens.
        """
        available = self.sequences(length)
        if available < 1:
            raise ValueError(
                f"the training text holds {len(self.train_tokens)} tokens, less than one sequence of {length}; "
                "give more text or a smaller train.sequence_tokens."
            )
        epochs = []
        for epoch in range(-(-count // available)):
            epochs.append(np.random.default_rng(derive(seed, "data order", epoch)).permutation(available))
        return np.concatenate(epochs)[:count]

    def order_hash(self, order: IntArray, length: int) -> str:
        """Hash of the token sequences themselves in the order in which a run reads them."""
        digest = hashlib.sha256(str(length).encode())
        for index in order:
            digest.update(self.sequence(int(index), length).tobytes())
        return digest.hexdigest()[:16]

    def sequence(self, index: int, length: int) -> IntArray:
        """Training sequence ``index``."""
        return np.asarray(self.train_tokens[index * length : (index + 1) * length])

    def held_out_documents(
        self, most_tokens: int, *, least: int = 2, part: Literal["validation", "tuning"] = "validation"
    ) -> list[tuple[str, IntArray]]:
        """(identity, token ids) of held-out documents, whole, in their fixed order, up to ``most_tokens`` in all.

        The last document is cut where the budget ends, so that every run scores exactly the same tokens. ``tuning``
        takes them from the end, and none that ``validation`` takes.

        Raises:
            ValueError: nothing is left for tuning.
        """
        names = list(enumerate(self.held_out_names))
        if part == "tuning":
            scored = {name for name, _ in self.held_out_documents(most_tokens, least=least)}
            names = [(number, name) for number, name in reversed(names) if name not in scored]
        found: list[tuple[str, IntArray]] = []
        left = most_tokens
        for number, name in names:
            ids = np.asarray(self.held_out_tokens[self.held_out_starts[number] : self.held_out_starts[number + 1]])[
                :left
            ]
            if len(ids) >= least:
                found.append((name, ids))
                left -= len(ids)
            if left < least:
                break
        if not found and part == "tuning":
            raise ValueError(
                f"validation takes all {len(names) + len(scored)} held-out documents, so that none is left to choose "
                "a learning rate on: give more text, a larger corpus.held_out or fewer evaluate.validation_tokens."
            )
        return found

    def passages(self, count: int, tokens: int) -> IntArray:
        """The first ``tokens`` tokens of ``count`` held-out documents that are long enough: [count, tokens].

        Raises:
            ValueError: fewer documents are long enough.
        """
        starts = self.held_out_starts
        long_enough = starts[:-1][np.diff(starts) >= tokens].tolist()
        if len(long_enough) < count:
            raise ValueError(
                f"only {len(long_enough)} held-out documents have {tokens} tokens, {count} are needed; "
                "give more text, fewer evaluate.passages or shorter evaluate.passage_tokens."
            )
        return np.stack([np.asarray(self.held_out_tokens[begin : begin + tokens]) for begin in long_enough[:count]])


def is_held_out(document: Document, share: float) -> bool:
    """Whether a document belongs to the held-out share: decided by the hash of its text alone."""
    return int(document.identity[:8], 16) / 2**32 < share


def prepare(config: CorpusConfig, *, cache: Path | None = None, progress: Progress | None = None) -> PackedCorpus:
    """Read, split, tokenise and pack a corpus, or find it in the cache.

    Args:
        config: which text and which vocabulary.
        cache: directory of the cache; None: :func:`cache_directory`.
        progress: called as progress(what, done, total).

    Raises:
        ValueError: the source does not exist, holds no text, or is too short to be split.
    """
    cache = cache or cache_directory()
    documents = read_documents(config, cache=cache, progress=progress)
    ready = None if config.tokenizer is None else _load_tokenizer(config.tokenizer)
    vocabulary = config.vocabulary if ready is None else ready.backend_tokenizer.to_str()
    key = hashlib.sha256(f"recipe {_RECIPE} {vocabulary} {config.held_out}".encode())
    for document in documents:
        key.update(document.identity.encode())
    path = cache / "packed" / key.hexdigest()[:16]
    if (found := load(path)) is not None:
        return found
    train = [item for item in documents if not is_held_out(item, config.held_out)]
    # by identity, so that a budget of held-out tokens takes a random part of the sources and not the first one
    held_out = sorted(
        (item for item in documents if is_held_out(item, config.held_out)), key=lambda item: item.identity
    )
    if not train or not held_out:
        raise ValueError(
            f"the text of {config.source!r} has {len(documents)} documents, too few to hold {config.held_out:.0%} "
            f"of them out ({len(train)} to train on, {len(held_out)} held out). Give more documents: one file each, or "
            f"separated by a line {END}."
        )
    return _build(path, train, held_out, ready, config, progress)


def read_documents(config: CorpusConfig, *, cache: Path, progress: Progress | None = None) -> list[Document]:
    """The documents of a source, without repeats."""
    if config.source == "python_docs":
        documents = python_docs(config.documents, cache=cache, progress=progress)
    else:
        documents = list(_local(Path(config.source)))
    unique = {item.identity: item for item in documents if item.text.strip()}
    if not unique:
        raise ConfigError(f"corpus.source {config.source!r} holds no text.")
    return list(unique.values())


def _local(source: Path) -> Iterable[Document]:
    """Documents of local files: a record each, or a part of a text file each.

    A text file is divided at lines ``<|endoftext|>``; one without any is a document when it stands in a directory with
    others, and is cut between paragraphs when it is all there is, because a single document cannot be held out.
    """
    from decondense.corpora.passages import read_file, text_files

    if not source.exists():
        raise ConfigError(
            f"corpus.source {str(source)!r} is neither 'python_docs' nor an existing file or directory of text."
        )
    files = text_files(source)
    for path in files:
        rows = read_file(path)
        if any(kind in path.suffixes for kind in (".jsonl", ".json", ".parquet")):
            texts = rows
        else:
            texts = "".join(rows).split(END)
            if len(texts) == 1 and len(files) == 1:
                texts = _cut(rows)
        for number, text in enumerate(texts):
            if text.strip():
                yield Document(f"{path.name}#{number}", text.strip())


def _cut(paragraphs: Sequence[str]) -> list[str]:
    pieces = [""]
    for paragraph in paragraphs:
        if len(pieces[-1]) >= _PIECE:
            pieces.append("")
        pieces[-1] += paragraph
    return pieces


def load(path: Path) -> PackedCorpus | None:
    """A prepared corpus, or None when there is none or its files are not those of its manifest."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if any(_file_hash(path / name) != expected for name, expected in manifest["files"].items()):
            return None
    except (OSError, ValueError, KeyError):
        return None
    return PackedCorpus(path, manifest)


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):  # a corpus may be larger than memory
            digest.update(block)
    return digest.hexdigest()


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"corpus.tokenizer {name!r} cannot be loaded: {reason} Without network, give a directory that holds it."
        ) from error
    if not found.is_fast:
        raise ConfigError(f"corpus.tokenizer {name!r} has no tokenizer.json; a fast tokenizer is needed.")
    if found.eos_token_id is None:
        raise ConfigError(f"corpus.tokenizer {name!r} has no end-of-text token to put between documents.")
    return found


def _build(
    path: Path,
    train: Sequence[Document],
    held_out: Sequence[Document],
    ready: Any | None,
    config: CorpusConfig,
    progress: Progress | None,
) -> PackedCorpus:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        if ready is None:
            if progress is not None:
                progress("learning the vocabulary", 0, 1)
            ready = _train_tokenizer(train, config.vocabulary)
            if progress is not None:
                progress("learning the vocabulary", 1, 1)
        ready.save_pretrained(folder / "tokenizer")
        end = ready.eos_token_id
        files = sorted(f"tokenizer/{item.name}" for item in (folder / "tokenizer").iterdir())
        for name, documents in (("train", train), ("held_out", held_out)):
            tokens, starts = _tokenise(ready, documents, end, f"tokenising ({name.replace('_', '-')})", progress)
            np.save(folder / f"{name}.npy", tokens)
            np.save(folder / f"{name}_starts.npy", starts)
            (folder / f"{name}_names.json").write_text(json.dumps([item.identity for item in documents]))
            files += [f"{name}.npy", f"{name}_starts.npy", f"{name}_names.json"]
        hashes = {name: _file_hash(folder / name) for name in files}
        manifest = {
            "config": config.model_dump(mode="json"),
            "content_hash": hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16],
            "vocabulary": len(ready),
            "train_documents": len(train),
            "held_out_documents": len(held_out),
            "train_tokens": len(np.load(folder / "train.npy", mmap_mode="r")),
            "held_out_tokens": len(np.load(folder / "held_out.npy", mmap_mode="r")),
            "characters": sum(len(item.text) for item in (*train, *held_out)),
            "files": hashes,
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
        try:
            os.rename(folder, path)
        except OSError:
            # another process finished the same corpus first, or a damaged one lies there
            if load(path) is None:
                shutil.rmtree(path, ignore_errors=True)
                os.rename(folder, path)
        prepared = load(path)
        assert prepared is not None, f"a corpus just written to {path} must load"
        return prepared
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _train_tokenizer(documents: Sequence[Document], vocabulary: int) -> Any:
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
    tokenizer.train_from_iterator(_sample(documents, _TOKENIZER_TEXT), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END
    )


def _sample(documents: Sequence[Document], characters: int) -> list[str]:
    """Documents in the order of their hashes until there are enough characters: a fixed random sample."""
    chosen: list[str] = []
    for document in sorted(documents, key=lambda item: item.identity[::-1]):
        chosen.append(document.text)
        characters -= len(document.text)
        if characters <= 0:
            break
    return chosen


def _tokenise(
    tokenizer: Any, documents: Sequence[Document], end: int, what: str, progress: Progress | None
) -> tuple[IntArray, IntArray]:
    pieces: list[IntArray] = []
    starts = [0]
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    batch = 256
    for first in range(0, len(documents), batch):
        texts = [item.text for item in documents[first : first + batch]]
        for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
            pieces.append(np.asarray([*encoding.ids, end], dtype=kind))
            starts.append(starts[-1] + len(pieces[-1]))
        if progress is not None:
            progress(what, min(first + batch, len(documents)), len(documents))
    return np.concatenate(pieces), np.asarray(starts, dtype=np.int64)
