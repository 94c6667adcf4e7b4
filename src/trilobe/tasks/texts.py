"""What the two tasks about texts share: files to examples, texts to input, exported graphs over rows of input.

An item is a text, a Python string. Its input is a row of words (see :mod:`.words`), and behind each word's numbers what
a frozen encoder says of it, where ``text.encoder`` names one. No torch here: an endpoint imports this file.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trilobe.config import Config
from trilobe.errors import BundleError, UnreadableExample, UsageError
from trilobe.infrastructure.pipeline import Arrays, Step, onnx_step
from trilobe.rows import as_rows, flat
from trilobe.tasks.reading import read_examples
from trilobe.tasks.words import N_CHARS, choose_preprocessing, decode, ids, split, to_bytes
from trilobe.types import FloatArray, Response, Span

if TYPE_CHECKING:
    from trilobe.tasks.pretrained import HuggingFace

RUNGS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # lengths that texts are filled up to
AT_ONCE = 64  # texts that an endpoint computes together: what its memory is measured by
BAG = 512  # columns of a bag of words


def read(data: bytes, suffix: str, max_tokens: int = 0) -> Iterator[tuple[bytes, Response | None, str]]:
    """The examples of a file: their bytes, what the file says of them, and where they stand in it (``"#3"``).

    With ``max_tokens``, a longer text becomes several examples, cut between sentences and never inside a span
    (``"#3:0-812"``, in code points). Errors are those of :func:`.reading.read_examples`.

    >>> [(d, where) for d, _, where in read(b"One two. Three.", ".txt", max_tokens=3)]
    [(b'One two.', ':0-8'), (b'Three.', ':9-15')]
    """
    found = read_examples(data, suffix)
    for number, (text, truth) in enumerate(found, 1):
        where = f"#{number}" if suffix != ".txt" else ""
        parts = split(text, max_tokens, truth.spans if truth else ()) if max_tokens else []
        if len(parts) < 2:
            yield to_bytes(text), truth, where
            continue
        for start, end in parts:
            yield to_bytes(text[start:end]), truth and _within(truth, start, end), f"{where}:{start}-{end}"


def _within(truth: Response, start: int, end: int) -> Response:
    inside = [Span(s.start - start, s.end - start, s.label) for s in truth.spans if start <= s.start < end]
    return Response(truth.kind, truth.labels, tuple(inside))


def captured(sent: NDArray[Any]) -> str:
    """The text a client sent, as it is kept: bytes as an array of numbers.

    >>> captured(np.frombuffer(b"a b", np.uint8))
    'a b'
    """
    return decode(sent.tobytes())


def content(text: str, exact: bool = False) -> str:
    """SHA-256 of what a person reads: all characters, or unless ``exact``, the words and not the spaces around them.

    >>> content("a  b\\n") == content("a b"), content("a  b\\n", exact=True) == content("a b", exact=True)
    (True, False)
    """
    said = text if exact else " ".join(text.split())
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()


def preprocessing(texts: Sequence[str], config: Config) -> dict[str, Any]:
    """How texts become input, from the pool and ``[text]``: plain values that travel in the bundle."""
    if not texts:
        raise UsageError("no texts to choose a preprocessing from", expected="at least one", hint="trilobe add FILE")
    spec = choose_preprocessing(texts) | {"max_tokens": config.text.max_tokens}
    if config.text.encoder != "words":
        encoder = _encoder(config.text.encoder, config.text.layers)
        spec |= {
            "encoder": config.text.encoder,
            "encoder_layers": config.text.layers,
            "encoder_digest": encoder.digest,
            "encoder_size": encoder.size,
        }
    return spec


def encode(texts: Sequence[str], spec: Mapping[str, Any], cut: bool = False) -> FloatArray:
    """Texts as rows of input, ``(T, columns)`` float32 each.

    Args:
        texts: ``n`` of them.
        spec: from :func:`preprocessing`.
        cut: keep of a text of more than ``max_tokens`` words the first and the last half of so many.

    Raises:
        BundleError: the frozen encoder of that name is not the one the model was trained with.
    """
    rows = ids(texts, spec)
    if name := spec.get("encoder"):
        encoder = _encoder(str(name), int(spec.get("encoder_layers", 0)))
        if encoder.digest != spec["encoder_digest"]:
            raise BundleError(
                f"the encoder {name!r} is another one now (SHA-256 {encoder.digest[:12]}...)",
                expected=f"the one the model was trained with ({str(spec['encoder_digest'])[:12]}...)",
            )
        rows = [np.hstack([row, said]) for row, said in zip(rows, encoder.words(texts), strict=True)]
    if cut:
        rows = [row[kept(len(row), int(spec["max_tokens"]))] for row in rows]
    return as_rows(rows)


def kept(n: int, most: int) -> NDArray[np.intp]:
    """Which of ``n`` words are looked at when only ``most`` are: the first and the last half (Sun et al. 2019).

    >>> kept(3, 4).tolist(), kept(9, 4).tolist()
    ([0, 1, 2], [0, 1, 7, 8])
    """
    if n <= most:
        return np.arange(n)
    return np.concatenate([np.arange(most - most // 2), np.arange(n - most // 2, n)])


@cache
def _encoder(name: str, layers: int) -> "HuggingFace":
    from trilobe.tasks.pretrained import HuggingFace

    return HuggingFace(name, layers=layers)


def bag(X: FloatArray) -> FloatArray:
    """``(n, n_features)`` of input rows, to judge likeness by without a network.

    What a frozen encoder says, on average over the words, where there is one; else the words themselves, in
    :data:`BAG` columns, each weighted by how rare it is here (tf-idf), of length 1.

    >>> X = as_rows(ids(["a b", "a b", "c d"], {"version": "words.v1", "buckets": 1024, "n_chars": 16}))
    >>> likeness = bag(X) @ bag(X).T
    >>> bool(likeness[0, 1] > 0.99), bool(likeness[0, 2] < 0.01)
    (True, True)
    """
    if not len(X):
        return np.zeros((0, BAG))
    if X[0].shape[1] > 1 + N_CHARS:
        said = np.stack([row[:, 1 + N_CHARS :].mean(axis=0) for row in X]).astype(np.float64)
    else:
        text = np.repeat(np.arange(len(X)), [len(row) for row in X])
        column = flat(X)[:, 0].astype(np.int64) * 2654435761 % 2**32 % BAG  # Knuth's hash: neighbors fall far apart
        counts = np.bincount(text * BAG + column, minlength=len(X) * BAG).reshape(len(X), BAG)
        said = np.log1p(counts) * np.log1p(len(X) / np.maximum((counts > 0).sum(axis=0), 1))
    return np.asarray(said / np.maximum(np.linalg.norm(said, axis=1, keepdims=True), 1e-12))


def rung(length: int) -> int:
    """To how many words a text of so many is filled up: by its own length alone.

    A sum over words is split up by how many there are, padding included, so a text that was filled up to its longest
    neighbor would get other last digits in other company.

    >>> rung(3), rung(9), rung(300)
    (8, 16, 512)
    """
    return next((r for r in RUNGS if length <= r), -(-length // RUNGS[-1]) * RUNGS[-1])


def graph_step(graph: bytes) -> Step:
    """A step from ``rows``, input of any lengths, to ``outputs``, what the exported graph gives for each.

    Rows of one :func:`rung` are computed together, :data:`AT_ONCE` at most, so memory does not grow with a request and
    the numbers of a text do not depend on the texts beside it.
    """
    name, run = onnx_step(graph)

    def model(arrays: Arrays) -> Arrays:
        rows, outputs = arrays["rows"], np.empty(len(arrays["rows"]), dtype=object)
        sizes = np.array([rung(len(row)) for row in rows])
        for size in np.unique(sizes):
            alike = np.flatnonzero(sizes == size)
            for start in range(0, len(alike), AT_ONCE):
                part = alike[start : start + AT_ONCE]
                filled = np.zeros((len(part), size, rows[part[0]].shape[1]), dtype=np.float32)
                for place, i in zip(filled, part, strict=True):
                    place[: len(rows[i])] = rows[i]
                for i, said in zip(part, run({"x": filled})["logits"], strict=True):
                    outputs[i] = said[: len(rows[i])] if said.ndim == 2 else said
        return {"outputs": outputs}

    return name, model


def sent_texts(arrays: Arrays) -> list[str]:
    """The texts of a request, from the BYTES tensor ``text``. An unreadable one refuses the request.

    >>> sent_texts({"text": objects([b"fine", b" "])})
    Traceback (most recent call last):
    trilobe.errors.UnreadableExample: text 1 of the request: a text of spaces only; expected at least one word
    """
    texts = []
    for i, entry in enumerate(arrays["text"]):
        try:
            texts.append(decode(entry))
        except UnreadableExample as e:
            raise UnreadableExample(f"text {i} of the request: {e.problem}", expected=e.expected) from e
    return texts


def objects(entries: Sequence[Any]) -> NDArray[Any]:
    """Anything as an object array ``(n,)``, also where all entries have one shape.

    >>> objects([np.zeros((2, 2))] * 3).shape
    (3,)
    """
    out = np.empty(len(entries), dtype=object)
    for i, entry in enumerate(entries):
        out[i] = entry
    return out
