"""The run folder on disk: write, read, resume, provenance; its levels as evidence."""
