"""A frozen encoder of somebody else's training: any of Hugging Face's, by name or by folder (extra ``text``).

What it says of a text never changes, so it is computed once and kept on disk, under the digest of the encoder and of
the text. Our own small networks take it as further columns of their input. Only safetensors weights are read, and no
code of a model's author is run. No torch at the top: an endpoint imports this file, and most need no encoder.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilobe.errors import MissingExtra, NotFoundError, StorageError, UsageError
from trilobe.files import write_atomically
from trilobe.tasks.words import VERSION, tokenize
from trilobe.types import FloatArray

Progress = Callable[[int, int], None]
PARTS = ("*.json", "*.txt", "*.model", "*.safetensors")  # of a repository: no pickles, no other formats
BATCH = 4096  # word pieces that are encoded at once


@dataclass(frozen=True)
class HuggingFace:
    """An encoder and what it says of words and texts.

    Args:
        name: a folder, or a model's name on the Hugging Face hub. The network is used only for a name that is not yet
            in Hugging Face's own cache.
        cache: where features are kept; ``trilobe/features`` in the user's cache folder where None.
        layers: how many of its layers are used; 0: all. What words are names of is said best by lower ones, and those
            are sooner done (``benchmarks/query-entities``).
    """

    name: str
    cache: Path | None = None
    layers: int = 0

    @cached_property
    def folder(self) -> Path:
        """Where the encoder's files lie."""
        if Path(self.name).is_dir():
            return Path(self.name)
        _transformers()
        from huggingface_hub import snapshot_download

        for local in (True, False):
            try:
                return Path(snapshot_download(self.name, allow_patterns=list(PARTS), local_files_only=local))
            except (OSError, ValueError) as e:  # not in the cache; then: no such model, no network
                problem = e
        raise NotFoundError(
            f"no encoder {self.name!r}: {str(problem).splitlines()[0]}",
            expected="a folder with a Hugging Face encoder, or a model's name on the hub and a network",
        ) from problem

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the files that decide what the encoder says."""
        found = sorted(p for pattern in PARTS for p in self.folder.glob(pattern))
        if not any(p.suffix == ".safetensors" for p in found):
            raise NotFoundError(
                f"no safetensors weights in {self.folder}", expected="model.safetensors and config.json"
            )
        total = hashlib.sha256()
        for path in found:
            with path.open("rb") as f:
                total.update(path.name.encode() + hashlib.file_digest(f, "sha256").digest())
        return total.hexdigest()

    @cached_property
    def size(self) -> int:
        """How many numbers it says of a word."""
        return int(self._model[1].config.hidden_size)

    def words(
        self,
        texts: Sequence[str],
        offsets: Sequence[Sequence[tuple[int, int]]] | None = None,
        progress: Progress | None = None,
    ) -> list[FloatArray]:
        """Per text ``(T, size)`` float32: of each word the mean over the word pieces it shares characters with.

        A text longer than the encoder's limit is encoded in windows that overlap by half, and each piece taken from
        where it stands farthest from an edge; so no word is lost, and each has its context on both sides. A word that
        the encoder drops (a stray joiner) is all zeros. Values are rounded to 16 bits, as they are kept.

        Args:
            texts: any.
            offsets: the words of each text where they are known; else those of :func:`.words.tokenize`.
            progress: called with (texts done, texts).
        """
        places = (
            [tokenize(t) for t in texts] if offsets is None else [[(int(a), int(b)) for a, b in o] for o in offsets]
        )
        rule = VERSION if offsets is None else "given"
        keys = [self._key(rule, t, p if offsets is not None else None) for t, p in zip(texts, places, strict=True)]

        def of_words(i: int, hidden: FloatArray, pieces: NDArray[np.int64]) -> FloatArray:
            return word_means(hidden, pieces, np.array(places[i], dtype=np.int64).reshape(-1, 2))

        return self._remembered(texts, keys, of_words, progress)

    def texts(self, texts: Sequence[str], progress: Progress | None = None) -> FloatArray:
        """``(n, size)`` float32: the mean over all word pieces of each text; zeros for an empty one."""
        keys = [self._key("text.v1", t, None) for t in texts]

        def of_text(i: int, hidden: FloatArray, pieces: NDArray[np.int64]) -> FloatArray:
            return np.asarray(hidden.mean(axis=0, keepdims=True) if len(hidden) else np.zeros((1, self.size)))

        found = self._remembered(texts, keys, of_text, progress)
        return np.concatenate(found) if found else np.zeros((0, self.size), dtype=np.float32)

    def _key(self, rule: str, text: str, offsets: Any) -> str:
        said = repr((self.digest, rule, text, offsets, *([self.layers] if self.layers else [])))
        return hashlib.sha256(said.encode("utf-8", "backslashreplace")).hexdigest()

    def _remembered(
        self,
        texts: Sequence[str],
        keys: Sequence[str],
        reduce: Callable[[int, FloatArray, NDArray[np.int64]], FloatArray],
        progress: Progress | None,
    ) -> list[FloatArray]:
        root = (self.cache or default_cache()) / self.digest[:16]
        out = [_load(root / key[:2] / key) for key in keys]
        missing = [i for i, found in enumerate(out) if found is None]
        done = len(texts) - len(missing)
        for i, hidden, pieces in self._encoded(texts, missing):
            half = reduce(i, hidden, pieces).astype(np.float16)
            _save(root / keys[i][:2] / keys[i], half)
            out[i] = half.astype(np.float32)
            done += 1
            if progress:
                progress(done, len(texts))
        return [found for found in out if found is not None]

    def _encoded(
        self, texts: Sequence[str], which: Sequence[int]
    ) -> Iterator[tuple[int, FloatArray, NDArray[np.int64]]]:
        """Per text its number, what the encoder says of its word pieces ``(P, size)``, and their offsets ``(P, 2)``."""
        if not which:
            return
        tokenizer, _, limit = self._model
        order = sorted(which, key=lambda i: len(texts[i]))  # texts of a length share a batch
        at = 0
        while at < len(order):
            batch: list[tuple[int, list[int], NDArray[np.int64]]] = []
            longest = 0
            while at < len(order) and (not batch or longest * (len(batch) + 1) <= BATCH):
                said = tokenizer(texts[order[at]], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
                pieces = np.array(said["offset_mapping"], dtype=np.int64).reshape(-1, 2)
                batch.append((order[at], list(said["input_ids"]), pieces))
                longest, at = max(longest, len(said["input_ids"])), at + 1
            cut = [(j, w) for j, (_, numbers, _) in enumerate(batch) for w in windows(len(numbers), limit)]
            hidden = self._run([batch[j][1][a:b] for j, (a, b) in cut])
            for j, (i, numbers, pieces) in enumerate(batch):
                mine = [(w, h) for (k, w), h in zip(cut, hidden, strict=True) if k == j]
                yield i, _joined(mine, len(numbers), self.size), pieces

    def _run(self, windows: Sequence[list[int]]) -> list[FloatArray]:
        """What the encoder says of each of the word pieces of each window, ``(P, size)``."""
        import torch

        tokenizer, model, _ = self._model
        before, after = _specials(tokenizer)
        full = [[*before, *w, *after] for w in windows]
        out: list[FloatArray] = []
        per = max(1, BATCH // max((len(w) for w in full), default=1))
        for start in range(0, len(full), per):
            part = full[start : start + per]
            length = max(len(w) for w in part)
            numbers = torch.full((len(part), length), tokenizer.pad_token_id or 0)
            mask = torch.zeros((len(part), length), dtype=torch.long)
            for row, w in enumerate(part):
                numbers[row, : len(w)], mask[row, : len(w)] = torch.tensor(w), 1
            with torch.inference_mode():
                said = model(input_ids=numbers, attention_mask=mask)
            hidden = said.last_hidden_state.float().numpy()
            out += [h[len(before) : len(w) - len(after)] for h, w in zip(hidden, part, strict=True)]
        return out

    @cached_property
    def _model(self) -> tuple[Any, Any, int]:
        """The tokenizer, the network, and how many word pieces it takes at once."""
        transformers = _transformers()
        cut = {"num_hidden_layers": self.layers} if self.layers else {}
        with _quiet(transformers):
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
                model = transformers.AutoModel.from_pretrained(
                    self.folder, local_files_only=True, use_safetensors=True, **cut
                )
            except (OSError, ValueError, KeyError) as e:
                raise NotFoundError(
                    f"{self.folder} holds no encoder that can be loaded: {str(e).splitlines()[0]}",
                    expected="a Hugging Face encoder with a tokenizer and safetensors weights",
                ) from e
        if not tokenizer.is_fast:
            raise UsageError(f"the tokenizer of {self.name!r} gives no offsets", expected="a fast tokenizer")
        positions = getattr(model.config, "max_position_embeddings", None) or 512
        limit = min(int(tokenizer.model_max_length), int(positions)) - sum(map(len, _specials(tokenizer)))
        return tokenizer, model.eval(), limit


def default_cache() -> Path:
    """``trilobe/features`` in the user's cache folder: ``XDG_CACHE_HOME``, else ``~/.cache``.

    >>> default_cache().parts[-2:]
    ('trilobe', 'features')
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trilobe" / "features"


def windows(n: int, limit: int) -> list[tuple[int, int]]:
    """Where ``n`` pieces are cut for an encoder that takes ``limit``: windows that overlap by half.

    >>> windows(3, 4), windows(9, 4)
    ([(0, 3)], [(0, 4), (2, 6), (4, 8), (5, 9)])
    """
    if n <= limit:
        return [(0, n)] if n else []
    step = max(1, limit // 2)
    return [(a, a + limit) for a in range(0, n - limit, step)] + [(n - limit, n)]


def word_means(hidden: FloatArray, pieces: NDArray[np.int64], words: NDArray[np.int64]) -> FloatArray:
    """The mean of ``hidden`` ``(P, size)`` over the pieces that share characters with each word, ``(T, size)``.

    ``pieces`` ``(P, 2)`` and ``words`` ``(T, 2)`` are offsets in order. A word without pieces is zeros.

    >>> word_means(np.array([[1.0], [3.0], [7.0]]), np.array([[0, 2], [2, 4], [5, 6]]), np.array([[0, 4], [5, 6]]))
    array([[2.],
           [7.]])
    """
    first = np.searchsorted(pieces[:, 1], words[:, 0], side="right")
    behind = np.maximum(np.searchsorted(pieces[:, 0], words[:, 1], side="left"), first)
    total = np.vstack([np.zeros((1, hidden.shape[1])), np.cumsum(hidden, axis=0, dtype=np.float64)])
    return np.asarray((total[behind] - total[first]) / np.maximum(behind - first, 1)[:, None])


def _joined(parts: Sequence[tuple[tuple[int, int], FloatArray]], n: int, size: int) -> FloatArray:
    """One row a piece, of the window whose middle is nearest."""
    if not parts:
        return np.zeros((0, size), dtype=np.float32)
    middle = np.array([(a + b) / 2 for (a, b), _ in parts])
    which = np.abs(np.arange(n)[:, None] + 0.5 - middle).argmin(axis=1)
    return np.stack([parts[w][1][i - parts[w][0][0]] for i, w in enumerate(which)])


def _specials(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The numbers that stand before and behind every text, found by looking at one."""
    said = tokenizer("a", return_special_tokens_mask=True)
    numbers, special = said["input_ids"], said["special_tokens_mask"]
    text = [i for i, s in enumerate(special) if not s]
    return numbers[: text[0]], numbers[text[-1] + 1 :]


def _load(path: Path) -> FloatArray | None:
    """What was kept, or None where nothing was, or it is damaged."""
    try:
        data = path.read_bytes()
        if hashlib.sha256(data[32:]).digest() == data[:32]:
            return np.asarray(np.load(io.BytesIO(data[32:]), allow_pickle=False), dtype=np.float32)
    except (OSError, ValueError):
        pass
    return None


def _save(path: Path, features: NDArray[np.float16]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, features, allow_pickle=False)
    with suppress(StorageError):  # a full or read-only disk costs time later, not the result
        write_atomically(path, hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as e:
        raise MissingExtra(
            "Hugging Face's transformers is not installed",
            expected="it, for text.encoder",
            hint="pip install 'trilobe[text]'",
        ) from e
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """The loader draws progress bars and remarks on standard error; loading a folder needs neither."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()
