"""What the command line does, callable from Python; each file says which extra it needs when that is missing."""

__all__: list[str] = []
