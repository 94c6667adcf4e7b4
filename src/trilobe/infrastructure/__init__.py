"""Lobe 3, infrastructure: the store, bundles, pipelines, endpoints, captures and what watches them. No torch here."""
