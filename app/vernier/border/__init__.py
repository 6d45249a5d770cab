"""The border between fronts, which own connections and formats, and the engine side, which owns models and devices."""
