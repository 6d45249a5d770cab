"""The scheduler: entrance, dispatch, workers, and the ends of requests."""
