"""Thin adapters between the nns-plugin core and its hosts; one package per host."""
