"""`gram embed`: from a source of pairs to a pair store, in parts that several processes share."""
