"""How policies and backbones learn."""
