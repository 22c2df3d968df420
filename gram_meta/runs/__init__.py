"""Run folders: what they hold, which checkpoint in them counts, and who may write to them."""
