"""Thin adapters between the nns-plugin core and its hosts; one flat module a host."""
