"""Serving: names behind which models answer, over HTTP and gRPC, as fast as the models allow.

A request passes these rooms: ``http`` (sockets, limits) or ``grpc`` or ``asgi`` -> ``server`` (paths, rights:
``access``) -> ``protocol`` (bytes to arrays) -> ``models`` (which version answers) -> ``batching`` (queues, threads) ->
``graph`` (pipelines of several models; ``steps``: functions in processes of their own), and back. ``metrics``, ``logs``
and ``traces`` watch; ``process`` is the life around it. No torch, no pickle, no framework in the path of a request: it
would cost more than the model.
"""

from trilobe.infrastructure.serve.batching import Batching
from trilobe.infrastructure.serve.graph import Flow, Function, Node, flow, function, graph
from trilobe.infrastructure.serve.http import Limits
from trilobe.infrastructure.serve.process import Settings, bind, serve_forever
from trilobe.infrastructure.serve.server import Server

__all__ = [
    "Batching", "Flow", "Function", "Limits", "Node", "Server", "Settings",
    "bind", "flow", "function", "graph", "serve_forever",
]  # fmt: skip
