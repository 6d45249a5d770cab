"""Processes: a supervisor that starts and watches front processes and the engine process."""
