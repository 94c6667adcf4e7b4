"""Triton behind its Python backend, as PyTriton packs it: ``python pytriton_cnn.py MODEL PORT BATCH``."""

import sys

import net

net.find_libpython()
net.serve_with_triton([sys.argv[1]], ["cnn"], (1, 28, 28), int(sys.argv[2]), int(sys.argv[3]))
