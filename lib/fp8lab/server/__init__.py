"""One vLLM process: its command, checks before the start, log, end, watchdog; the emulated GPU."""
