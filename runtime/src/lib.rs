//! Process plumbing: logs, metrics, shutdown, listeners, clock.
