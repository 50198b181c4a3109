"""The measurement, the ranking and the report of a sweep's trials, and the clip search."""
