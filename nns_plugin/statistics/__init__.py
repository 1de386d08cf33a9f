"""Statistics: mergeable sums about what units did on calibration data, and the pass that collects them."""
