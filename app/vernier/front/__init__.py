"""Connections and formats: what arrives at a socket becomes batches of requests, and their answers become bytes."""
