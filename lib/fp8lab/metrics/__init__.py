"""Pure functions, tables in, numbers out: latency, resources, what limited a level, SLOs, statistics, quality."""
