"""NNI's experiment engine: experiments, their trials, and the guard that ends what a killed sweep leaves."""
