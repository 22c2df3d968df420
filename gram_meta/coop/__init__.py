"""Everything that reaches into a CoOp-style checkout or changes how its code behaves."""
