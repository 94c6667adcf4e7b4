"""Whether what an endpoint answers still looks like what its model answered on held-out data.

A `Baseline` is counted once from held-out predictions and travels in the bundle; `find` holds a window of captures
against it and returns a verdict with the findings behind it. Three rules look at every window: one class predicted
most of the time, consistently low confidence, and another mix of classes. Each is a test first and an effect second:
a bare distance between small samples is never zero, so a fixed threshold on it alarms on healthy traffic. Nothing
here stores, schedules or draws, and no label is needed.

What is guaranteed. If the window's predictions and the baseline's are exchangeable (the traffic is drawn as the
held-out data were, each capture by itself), then all rules together alarm with probability at most ``alpha`` per
window, for every window size, number of classes and imbalance, with no large-sample approximation. The probability
is over the draw of baseline and window both.

What is not. Each window is a new chance: a hundred clean windows give up to ``100 * alpha`` false alarms on average.
One fixed baseline may be an unlucky draw, and its windows then alarm more often than ``alpha``, again and again; a
larger baseline makes that rarer. Captures that come in runs (the frames of one video) are not exchangeable. Silence
is no proof: a drift that keeps the classes and the confidences is invisible here.
"""

from trilobe.infrastructure.monitor.baseline import Baseline
from trilobe.infrastructure.monitor.window import Verdict, Window, false_alarm_rate, find

__all__ = ["Baseline", "Verdict", "Window", "false_alarm_rate", "find"]
