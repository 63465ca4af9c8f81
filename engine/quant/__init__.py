"""Quantisation: one format or method per file; `registry` names them, `method` is the interface layers see."""
