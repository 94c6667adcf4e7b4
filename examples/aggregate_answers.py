"""Who is right when people disagree, and who is good: three columns in, beliefs and confusion matrices out.

Five people judged eight pictures; some said only "not this one". Nothing but numpy arrays and a few rows is needed.

Prints:

picture   majority  weighed   probability
...
8         fox       dog       0.9...
8 pictures, 5 people
...
cleo      ... right; takes dog for fox with probability 0...
"""

import numpy as np

from trilobe import Answer, LabelSpace, Response
from trilobe.data.beliefs import AnswerTable, DawidSkene, majority_vote

SPACE = LabelSpace(("cat", "dog", "fox"))
SAID = """
ann  cat dog fox dog cat fox cat dog
bob  cat dog fox dog cat fox cat not:cat
cleo cat fox fox fox cat fox cat fox
dan  dog dog cat fox dog cat cat fox
eva  cat dog fox dog cat not:dog cat ?
"""


def response(text: str) -> Response:
    """What somebody said, as a set of classes it leaves possible."""
    if text == "?":
        return Response("unsure")
    return Response("not", (text[4:],)) if text.startswith("not:") else Response("class", (text,))


answers = []
for line in SAID.split("\n")[1:-1]:
    who, *labels = line.split()
    for picture, label in enumerate(labels, start=1):
        answers.append(Answer(f"{who}{picture}", f"q{picture}", str(picture), who, response(label)))

table = AnswerTable.from_answers(answers, SPACE)
votes = majority_vote(table)
crowd = DawidSkene().fit(table)

print(f"{'picture':<10}{'majority':<10}{'weighed':<10}probability")
for picture, vote, belief in zip(table.examples, votes, crowd.proba_, strict=True):
    print(f"{picture:<10}{SPACE.names[vote.argmax()]:<10}{SPACE.names[belief.argmax()]:<10}{belief.max():.2f}")
print(f"{len(table.examples)} pictures, {len(table.annotators)} people")
for name, quality, matrix in zip(table.annotators, crowd.quality(), crowd.confusion_, strict=True):
    print(f"{name:<10}{quality:.2f} right; takes dog for fox with probability {np.round(matrix[1, 2], 2)}")
