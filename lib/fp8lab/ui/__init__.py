"""What a person sees of the work: one status line, one table, text made safe."""
