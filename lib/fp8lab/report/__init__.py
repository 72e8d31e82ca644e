"""From a run to words and pictures: verdicts, tables, figures, notebooks, pages."""
