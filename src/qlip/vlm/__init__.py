"""Language models that see: QLIP as the eye of a text decoder; `evaluate` measures them on made scenes."""
