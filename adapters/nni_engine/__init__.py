"""NNI's experiment engine: experiments, their trials, and the guard that ends processes left by a killed sweep.

Nothing is imported here: the guard must not import NNI.
"""

__all__: list[str] = []
