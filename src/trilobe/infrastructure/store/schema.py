"""The tables, one per noun, as the newest migration leaves them. How a field becomes a column stands in ``records``.

``seq`` is the order of insertion. Writers take turns on both databases, so it is the order of commits too. Answers
are only ever inserted. A change here needs a migration in ``migrations/versions``; a test holds the two together.
"""

from sqlalchemy import Column, ForeignKey, ForeignKeyConstraint, Index, Integer, MetaData, Table, Text, UniqueConstraint

from trilobe.infrastructure.store.records import (
    COUNT,
    MAYBE_NUMBER,
    MAYBE_TRUE,
    NAMES,
    NUMBER,
    PATH,
    RESPONSE,
    SPACE,
    VALUE,
    WORDS,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

examples = Table(
    "examples",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("id", WORDS, nullable=False, unique=True),
    Column("name", WORDS, nullable=False),
    Column("split", WORDS, nullable=False),
    Column("source", WORDS, nullable=False),
    Column("groups", VALUE, nullable=False),
    Column("added_at", NUMBER),
    Column("content", Text, unique=True),  # digest of the decoded content: the same picture in another file
)

questions = Table(
    "questions",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("id", WORDS, nullable=False, unique=True),
    Column("example_id", WORDS, ForeignKey("examples.id"), nullable=False),
    Column("choices", NAMES, nullable=False),
    Column("strategy", WORDS, nullable=False),
    Column("score", NUMBER),
    Column("reason", WORDS, nullable=False),
    Column("round", COUNT, nullable=False, index=True),
    Column("assignees", NAMES, nullable=False),
    Column("created_at", NUMBER),
    UniqueConstraint("id", "example_id"),  # what an answer refers to: it cannot name another example
)

answers = Table(
    "answers",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("id", WORDS, nullable=False, unique=True),
    Column("question_id", WORDS, nullable=False),
    Column("example_id", WORDS, nullable=False, index=True),
    Column("annotator", WORDS, nullable=False),
    Column("response", RESPONSE, nullable=False),
    Column("seconds", NUMBER),
    Column("answered_at", NUMBER),
    ForeignKeyConstraint(["question_id", "example_id"], ["questions.id", "questions.example_id"]),
    Index(None, "question_id", "annotator"),
)

models = Table(
    "models",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("id", WORDS, nullable=False, unique=True),
    Column("task", WORDS, nullable=False),
    Column("space", SPACE, nullable=False),
    Column("weights", WORDS, nullable=False),
    Column("preprocessing", VALUE, nullable=False),
    Column("network", VALUE, nullable=False),
    Column("temperature", NUMBER),
    Column("origin", VALUE, nullable=False),
    Column("metrics", VALUE, nullable=False),
    Column("created_at", NUMBER),
)

evidence = Table(
    "evidence",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("model_id", WORDS, ForeignKey("models.id"), nullable=False),
    Column("check", WORDS, nullable=False),
    Column("figure", NUMBER),
    Column("low", NUMBER),
    Column("high", NUMBER),
    Column("n", COUNT, nullable=False),
    Column("threshold", MAYBE_NUMBER),
    Column("direction", WORDS, nullable=False),
    Column("passed", MAYBE_TRUE),
    Column("detail", VALUE, nullable=False),
    Index(None, "model_id", "check"),
)

bundles = Table(
    "bundles",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("id", WORDS, nullable=False, unique=True),
    Column("path", PATH, nullable=False),
    Column("model_id", WORDS, ForeignKey("models.id"), nullable=False),
    Column("manifest", VALUE, nullable=False),
)

findings = Table(
    "findings",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("id", WORDS, nullable=False, unique=True),
    Column("endpoint", WORDS, nullable=False, index=True),
    Column("bundle_id", WORDS, nullable=False),  # no key: an endpoint may serve a bundle made elsewhere
    Column("kind", WORDS, nullable=False),
    Column("message", WORDS, nullable=False),
    Column("figure", NUMBER),
    Column("expected", NUMBER),
    Column("low", NUMBER),
    Column("high", NUMBER),
    Column("p_value", NUMBER),
    Column("n", COUNT, nullable=False),
    Column("capture_ids", NAMES, nullable=False),
    Column("detail", VALUE, nullable=False),
    Column("created_at", NUMBER),
)

journal = Table(
    "journal",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("key", WORDS, nullable=False, unique=True),
    Column("value", VALUE, nullable=False),
)
