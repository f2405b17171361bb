"""The timm models that can be pruned, and how each of them computes its parts."""
