"""The training system: knows the types that travel, never the truth."""
