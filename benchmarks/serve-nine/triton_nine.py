"""Nine models behind Triton's Python backend: ``python triton_nine.py MODELS PORT``; MODELS has m0.onnx to m8.onnx."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "serve-peers" / "peers"))
import net

net.find_libpython()
graphs = sorted(Path(sys.argv[1]).glob("m*.onnx"))
net.serve_with_triton([str(p) for p in graphs], [p.stem for p in graphs], (3, 64, 64), int(sys.argv[2]), 64)
