"""Subnets: a model restricted to some units and labels."""
