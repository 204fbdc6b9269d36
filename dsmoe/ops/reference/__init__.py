"""Plain torch implementations of every operation: the meaning of the op, and the fallback on any device."""
