"""Requests: HTTP streams, schedules, worker processes, telemetry."""
