"""Tables of a run: views of its levels. Each is data for a notebook's cell and a terminal, and writes nothing."""
