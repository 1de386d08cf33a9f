"""NNI's experiment engine: experiments, their trials, and the guard that ends what a killed sweep leaves.

Nothing is imported here: the guard must not import NNI.
"""

__all__: list[str] = []
