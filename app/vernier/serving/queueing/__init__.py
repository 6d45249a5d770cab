"""What waits and what should run next, without clock, threads or loop."""
