"""The pipeline behind an endpoint of entities: texts in, entities out. No torch, unless a frozen encoder needs it."""

import json

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from trilobe.infrastructure.bundle import read_bytes, read_json
from trilobe.infrastructure.pipeline import Arrays, Pipeline, Servable, TensorSpec
from trilobe.statistics import softmax
from trilobe.tasks.entity_recognition.data import entities, entity_labels, log_marginals, watched
from trilobe.tasks.texts import encode, graph_step, objects, sent_texts
from trilobe.tasks.words import split
from trilobe.types import Bundle, LabelSpace


def servable(bundle: Bundle) -> Servable:
    """What a bundle of an entity recognizer does with a request.

    Input ``text``: BYTES ``[n]``, UTF-8. A text longer than the preprocessing's ``max_tokens`` is cut between sentences
    and put together again, so positions count from its beginning. Outputs: ``proba`` FP32 ``[n, 1 + n_labels]``, of the
    text's least certain word (what is monitored), and ``entities`` BYTES ``[n]``, each a JSON list of
    ``{"start", "end", "label", "text", "confidence"}`` in code points.
    """
    preprocessing = read_json(bundle, "preprocessing.json")
    temperature = float(read_json(bundle, "calibration.json")["temperature"])
    labels = read_json(bundle, "labels.json")
    space = LabelSpace(tuple(labels["names"]), scheme=labels["scheme"])
    weights = load(read_bytes(bundle, "weights.safetensors"))

    def prepare(arrays: Arrays) -> Arrays:
        texts = sent_texts(arrays)
        parts = [(i, a, b) for i, text in enumerate(texts) for a, b in split(text, int(preprocessing["max_tokens"]))]
        rows = objects(list(encode([texts[i][a:b] for i, a, b in parts], preprocessing)))
        return {"rows": rows, "parts": np.array(parts), "texts": objects(texts)}

    def finish(arrays: Arrays) -> Arrays:
        n = len(arrays["texts"])
        found: list[list[dict[str, object]]] = [[] for _ in range(n)]
        proba: list[list[NDArray[np.float64]]] = [[] for _ in range(n)]
        for output, (i, start, end) in zip(arrays["outputs"], arrays["parts"].tolist(), strict=True):
            rows = softmax(log_marginals(output, weights), temperature)
            for entity in entities(arrays["texts"][i][start:end], rows, space):
                found[i].append(entity | {"start": entity["start"] + start, "end": entity["end"] + start})
            proba[i].append(rows)
        whole = objects([np.concatenate(rows) for rows in proba])
        said = [json.dumps(entities, ensure_ascii=False).encode() for entities in found]
        return {"proba": watched(whole, space).astype(np.float32), "entities": objects(said)}

    return Servable(
        Pipeline([("preprocess", prepare), graph_step(read_bytes(bundle, "model.onnx")), ("entities", finish)]),
        inputs=(TensorSpec("text", "BYTES", (-1,)),),
        outputs=(
            TensorSpec("proba", "FP32", (-1, 1 + len(entity_labels(space)))),
            TensorSpec("entities", "BYTES", (-1,)),
        ),
        warmup={"text": objects([b"Warm up."])},
    )
