"""The run folder on disk: write, read, resume, provenance, export; its levels as evidence."""
