"""Any torch model: its inputs, copies, hooks, norms and the geometry of its layers."""
