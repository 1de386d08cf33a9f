"""Compensation: kept units take over what removed ones contributed; no host in here."""
