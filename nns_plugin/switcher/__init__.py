"""Switcher: a network that learns how much each unit matters."""
